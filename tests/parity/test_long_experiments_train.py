"""The experiments with a million tokens, with other sizes: what they are made of trains together."""

from __future__ import annotations

import math

import pytest
from small_jobs import SmallJobs, curve, state

SIZES = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=8",
    "model.vocab_size=null",
    "train.iters=4",
    "train.loss_chunk_tokens=24",
    "topology.tp=1",
    "lr=constant",
    "lr.lr=1e-2",
]
# Segments keep their proportion to the sequence of 64 tokens, or to what a rank has of it.
CASES = {
    "long_fast": ["model.num_query_groups=4", "topology.cp=1", "attention.params.segment_lengths=[16,32,64]"],
    "long_production": [
        "model.num_query_groups=8",
        "topology.cp=2",
        "attention.params.segment_lengths=[8,16,32,64]",
        "checkpoint.save_interval=2",
        "train.eval_interval=2",
        "train.eval_iters=1",
    ],
    "long_conservative": [
        "model.num_query_groups=4",
        "topology.cp=1",
        "attention.params.segment_lengths=[4,8,16]",
        "checkpoint.save_interval=2",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_tiny_twin_trains(name, small_jobs: SmallJobs):
    run = small_jobs.run([f"experiment={name}", f"name=tiny_{name}", *SIZES, *CASES[name]])
    losses = [loss for loss, _ in curve(run)]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert state(run).status == "finished"
