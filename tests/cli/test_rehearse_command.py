"""``launch/plan.py action=rehearse`` as a user types it."""

from __future__ import annotations

import json

import pytest

from megaplug.commands.plan import main

SMALL = ["action=rehearse", "model=tiny", "model.vocab_size=1000", "precision=bf16"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["topology=dp2", "ranks=[0,2]"], "there is no rank 2 among 2"),
        (
            ["topology=tp2", "topology.world_size=128", "train.global_batch_size=256", "ranks=all"],
            "128 ranks",
        ),
        (["topology=cp2", "attention=te"], "topology.cp=2"),
        (["topology=dp2", "topology.zero=2"], "topology.zero=2"),
        (
            ["megatron.gradient_accumulation_fusion=true"],
            "these cannot be rehearsed: megatron.gradient_accum",
        ),
        (["topology=tp2", "model.num_attention_heads=3"], "num_attention_heads"),
        (["tokens=3T"], "tokens=... means nothing to action=rehearse"),
    ],
)
def test_what_cannot_be_rehearsed_is_said_before_anything_starts(capsys, words, said):
    assert main([*SMALL, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_an_uneven_pipeline_hold_what_the_plan_says(capsys):
    words = ["topology=tp2_pp2", "model.num_layers=5", "topology.decoder_first_pipeline_num_layers=2"]
    batch = ["train.micro_batch_size=1", "train.global_batch_size=4", "topology.world_size=8"]
    batch += ["topology.sequence_parallel=true"]
    assert main([*SMALL, *words, *batch, "ranks=[0,7]", "output=json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    first, last = answer["ranks"]
    assert (first["rank"], first["stage"], last["rank"], last["stage"]) == (0, 0, 7, 1)
    for found in (first, last):
        beside = {each["name"]: each for each in found["planned_and_rehearsed"]}
        for name in ("parameters", "weights", "gradients"):
            assert beside[name]["difference"] == 0, (name, beside[name])
        traffic = {(each["group"], each["collective"]): each for each in found["traffic"]}
        # bf16 weights are gathered and fp32 gradients scattered over two data-parallel ranks, padded a little
        for collective, size in (("all_gather", 2), ("reduce_scatter", 4)):
            moved = traffic["dp_cp", collective]["bytes"]
            assert 0 <= moved - size * found["dense_parameters"] < size * 1024 * 8
    # Two microbatches of 256 tokens by 128 channels in bf16, forward and back; each rank its half.
    moved = {(each["group"], each["collective"]): each["bytes"] for each in first["traffic"]}
    assert moved["pp", "send"] == moved["pp", "recv"] == 2 * 256 * 128 * 2 // 2
