"""The loss in chunks of tokens: what it goes with, and what is refused by name."""

from __future__ import annotations

import pytest
from job_factory import small_job

from megaplug.job.checks import check


@pytest.mark.parametrize("tokens", [1, 64, 10**6])
def test_any_number_of_tokens_is_a_chunk(tokens):
    assert not check(small_job(f"train.loss_chunk_tokens={tokens}"))


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (["train.loss_chunk_tokens=0"], "train.loss_chunk_tokens", "above 0"),
        (["megatron.cross_entropy_loss_fusion=true"], "megatron.cross_entropy_loss_fusion", "own loss"),
        (["megatron.mtp_num_layers=1"], "megatron.mtp_num_layers", "multi-token prediction"),
        (["megatron.defer_embedding_wgrad_compute=true"], "megatron.defer_embedding_wgrad_compute", "later"),
        (["topology.zero=3", "topology.fsdp=torch"], "train.loss_chunk_tokens", "when the layer is called"),
    ],
)
def test_what_needs_all_logits_or_a_gathered_weight_is_refused(words, key, said):
    problems = check(small_job("train.loss_chunk_tokens=64", *words))
    assert [problem.key for problem in problems if said in problem.message] == [key]
