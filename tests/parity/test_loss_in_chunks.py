"""The loss in chunks of tokens through ``pretrain()``: the curves and validations of the loss at once.

Within 1e-6, relative: in fp32 sums are taken in another order, and three steps carry that on.
"""

from __future__ import annotations

import functools

import pytest
from kept_for_backward import record_what_is_kept
from small_jobs import SmallJobs, curve, validations

STEPS = ["train.iters=3", "lr=constant", "lr.lr=1e-3", "train.eval_iters=2", "train.eval_interval=3"]
# No chunk divides the 64 tokens of a sequence, nor those of a rank.
CHUNKS = ["train.loss_chunk_tokens=15"]
WITHIN = 1e-6
CASES = {
    "tp2 x pp2, tied": [
        "topology.tp=2",
        "topology.pp=2",
        "model.untie_embeddings_and_output_weights=false",
        "train.micro_batch_size=2",
    ],
    "cp2, per token": ["topology.cp=2", "attention=ring", "+megatron.calculate_per_token_loss=true"],
    # The output layer's weights come by themselves from the rank that has updated them.
    "dp2": ["topology.dp=2", "megatron.ddp_bucket_size=4000"],
    "experts, computed again": [
        "moe=small",
        "moe.moe_ffn_hidden_size=64",
        "train.recompute_granularity=full",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_chunks_change_no_curve(name, small_jobs: SmallJobs, tmp_path):
    number = list(CASES).index(name)
    found, kept = [], []
    for words in ([], CHUNKS):
        file = tmp_path / f"kept{len(kept)}"
        plant = functools.partial(record_what_is_kept, file)
        run = small_jobs.run([*STEPS, *CASES[name], *words, f"name=chunks_{number}_{len(kept)}"], plant=plant)
        found.append(sum([*curve(run), *validations(run)], ()))
        kept.append(int(file.read_text()))
    whole, chunked = found
    assert len(whole) == len(chunked) == 3 * 2 + 2
    assert max(abs(a - b) / abs(b) for a, b in zip(chunked, whole, strict=True)) < WITHIN
    if name == "experts, computed again":
        # One rank, on which the logits of 64 tokens and 384 words are most of what is kept.
        assert kept[0] - kept[1] > 0.9 * 4 * 64 * 384
