"""Checkpoints that could never be kept as asked are named before the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_factory import data_facts, resolved

from megaplug.commands.resolved import _bytes_beside_saving, _room_for_checkpoints, memory_of
from megaplug.job.checks import check_facts, job_shape
from megaplug.job.retention import retention
from megaplug.runs.retention import Retention

WORDS = ["train.iters=300", "checkpoint.save_interval=50", "train.eval_interval=100"]


def problems(*words: str, **facts: object) -> list[str]:
    job, _, derived, found = resolved(*WORDS, *words, facts=data_facts(**facts))  # type: ignore[arg-type]
    return [str(problem) for problem in check_facts(job, derived, found)]


def test_what_can_be_kept_is_no_problem() -> None:
    assert problems("checkpoint.keep_every=150", "checkpoint.keep_best=2") == []
    job, *_ = resolved(*WORDS, "checkpoint.keep=3", "checkpoint.keep_every=150", "checkpoint.keep_best=2")
    assert retention(job) == Retention(3, 150, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint.keep_every=70"], "no step of 300 is a multiple of 70 and is saved"),
        (["checkpoint.keep_best=1", "train.eval_iters=0"], "train.eval_iters is 0"),
        (["checkpoint.keep_best=1", "train.eval_interval=70"], "saved is every 50 steps, validated every 70"),
    ],
)
def test_what_could_never_be_kept_is_named(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem and problem.startswith(words[0].partition("=")[0])


def test_the_best_need_text_to_be_validated_on() -> None:
    (problem,) = problems("checkpoint.keep_best=1", prefixes={"train": "/data/train"})
    assert "data.split leaves no text" in problem


def test_the_disk_is_asked_for_all_that_is_kept(tmp_path: Path) -> None:
    words = ["checkpoint.keep_every=100", "checkpoint.keep_best=1", f"runs_dir={tmp_path}"]
    job, _, derived, _ = resolved(*WORDS, *words)
    # Two, one, those of steps 100, 200 and 300, and the one that is being written; 16 bytes a parameter.
    assert _room_for_checkpoints(job, derived, "00000000", 1000) == 7 * 16 * 1000


@pytest.mark.parametrize(("word", "counts"), [("checkpoint.async_save=false", False), ("device=cpu", True)])
def test_memory_is_asked_for_a_save_beside_training(word: str, counts: bool) -> None:
    job, topology, derived, _ = resolved(*WORDS, word)
    memory = memory_of(job, topology, job_shape(job, derived.vocab_size))
    expected = memory.weights + memory.optimizer if counts else 0
    assert _bytes_beside_saving(derived, memory) == expected
    assert memory.weights > 0
