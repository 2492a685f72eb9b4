"""Lengths follow from one another, the vocabulary from the tokenizer, the backend from the machine."""

from __future__ import annotations

import math

import pytest
from job_factory import data_facts, resolved

from megaplug.job import packages
from megaplug.job.derive import resolve_backend, resolve_device

TOKENS_PER_ITER = 16 * 256


def test_iterations_give_tokens_and_epochs() -> None:
    _, _, derived, _ = resolved("train.iters=50")
    assert (derived.iters, derived.tokens, derived.tokens_per_iter) == (
        50,
        50 * TOKENS_PER_ITER,
        TOKENS_PER_ITER,
    )
    assert derived.epochs == pytest.approx(50 * TOKENS_PER_ITER / 1_000_000)


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    _, _, derived, _ = resolved("train.iters=null", f"train.tokens={10 * TOKENS_PER_ITER + 1}")
    assert (derived.iters, derived.tokens) == (11, 11 * TOKENS_PER_ITER)


def test_epochs_cover_the_training_text() -> None:
    _, _, derived, _ = resolved("train.iters=null", "train.epochs=2")
    assert derived.iters == math.ceil(2_000_000 / TOKENS_PER_ITER)


def test_the_vocabulary_is_padded_alike_for_every_number_of_tensor_parallel_ranks() -> None:
    assert resolved()[2].padded_vocab_size == 384
    assert resolved("topology.tp=2")[2].padded_vocab_size == 384
    assert (
        resolved("model=llama3_8b", "topology.tp=8", "train.micro_batch_size=1")[2].padded_vocab_size
        == 128256
    )


def test_without_validation_text_nothing_is_validated() -> None:
    facts = data_facts(prefixes={"train": "/data/train"})
    assert resolved(facts=facts)[2].eval_iters == 0


def test_auto_means_the_gpu_where_there_is_one() -> None:
    assert [resolve_device("auto", gpus) for gpus in (0, 1)] == ["cpu", "cuda"]
    assert resolve_device("cpu", 8) == "cpu"


def test_auto_takes_transformer_engine_only_on_cuda_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda key: key == "te")
    assert [resolve_backend("auto", device) for device in ("cpu", "cuda")] == ["native", "te"]
    assert resolve_backend("native", "cuda") == "native"
    assert resolve_backend("auto", "cuda", te="off") == "native"
    monkeypatch.setattr(packages, "is_installed", lambda key: False)
    assert resolve_backend("auto", "cuda") == "native"
