"""The rules, on the seed topologies of `planner.md` and on one mistake at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megaplug.job.schema import TopologyConfig
from megaplug.topology import Batch, ModelShape, resolve, violations

SEED_30B = ModelShape(16, 1024, 14336, 16, 16, 64, 2048, 32000, num_experts=64, swiglu=False)
SEED_200B = ModelShape(96, 12288, 49152, 96, 12, 128, 2048, 32000)
SEED_400B = ModelShape(120, 16384, 65536, 128, 16, 128, 2048, 32000)
SEED_1T = ModelShape(150, 20480, 81920, 160, 20, 128, 2048, 32000, num_experts=128)
LLAMA_405B = ModelShape(126, 16384, 53248, 128, 8, None, 8192, 128256)
TINY = ModelShape(4, 256, 688, 8, 2, None, 256, 256)
TINY_MOE = replace(TINY, num_experts=4, moe_ffn_hidden_size=344)
BATCH = Batch(1, 4096)


def found(shape, batch=BATCH, **request):
    topology, problems = resolve(TopologyConfig(**request))
    assert topology is not None
    return topology, problems + violations(topology, shape, batch)


@pytest.mark.parametrize(
    ("world_size", "request_", "dp", "expert_dp"),
    [
        (16, {"tp": 4, "pp": 4, "ep": 4, "etp": 1}, 1, 1),
        (16, {"tp": 4, "pp": 4, "ep": 2, "etp": 2}, 1, 1),
        (16, {"tp": 4, "pp": 4, "ep": 1, "etp": 4}, 1, 1),
        (16, {"tp": 2, "pp": 4, "ep": 4, "etp": 1}, 2, 1),
        (16, {"tp": 4, "pp": 2, "ep": 8, "etp": 1}, 2, 1),
        (16, {"tp": 4, "pp": 1, "ep": 16, "etp": 1}, 4, 1),
        (32, {"tp": 4, "pp": 4, "ep": 8, "etp": 1}, 2, 1),
        (64, {"tp": 4, "pp": 4, "ep": 16, "etp": 1}, 4, 1),
        (64, {"tp": 4, "cp": 2, "pp": 4, "ep": 16, "etp": 1}, 2, 1),
        (128, {"tp": 4, "pp": 4, "ep": 16, "etp": 2}, 8, 1),
        (256, {"tp": 4, "pp": 4, "ep": 16}, 16, 1),
        (512, {"tp": 4, "pp": 4, "ep": 16}, 32, 2),
        (4 * 2 * 8 * 4, {"tp": 4, "cp": 2, "pp": 4, "ep": 64, "etp": 1}, 8, 1),
    ],
)
def test_the_seed_meshes_that_exist_are_let_through(world_size, request_, dp, expert_dp):
    topology, problems = found(SEED_30B, world_size=world_size, **request_)
    assert problems == []
    assert (topology.dp, topology.expert_dp) == (dp, expert_dp)


@pytest.mark.parametrize(
    ("world_size", "request_", "numbers"),
    [
        (16, {"tp": 4, "pp": 4, "ep": 16}, "etp 4 x ep 16 x pp 4 = 256 does not divide the world size 16"),
        (
            16,
            {"tp": 4, "pp": 4, "ep": 16, "etp": 1},
            "etp 1 x ep 16 x pp 4 = 64 does not divide the world size 16",
        ),
        (
            32,
            {"tp": 4, "pp": 4, "ep": 16, "etp": 1},
            "etp 1 x ep 16 x pp 4 = 64 does not divide the world size 32",
        ),
    ],
)
def test_the_seed_meshes_that_do_not_exist_show_the_product(world_size, request_, numbers):
    _, problems = found(SEED_30B, world_size=world_size, **request_)
    assert [problem.key for problem in problems] == ["topology.ep"]
    assert numbers in problems[0].message
    assert problems[0].hint


def test_every_problem_of_the_large_seeds_is_named_at_once():
    keys = {
        "200B on 8": found(SEED_200B, tp=8, pp=8, world_size=8)[1],
        "200B on 256": found(SEED_200B, tp=8, pp=8, world_size=256)[1],
        "400B on 32": found(SEED_400B, tp=8, pp=16, world_size=32)[1],
        "400B on 512": found(SEED_400B, tp=8, pp=16, world_size=512)[1],
        "1T": found(SEED_1T, tp=16, pp=32, ep=128, world_size=4096)[1],
        "1T etp1": found(SEED_1T, tp=16, pp=32, ep=128, etp=1, world_size=4096)[1],
    }
    assert {name: [problem.key for problem in problems] for name, problems in keys.items()} == {
        "200B on 8": ["topology.world_size", "topology.tp"],
        "200B on 256": ["topology.tp"],
        "400B on 32": ["topology.world_size", "topology.pp"],
        "400B on 512": ["topology.pp"],
        "1T": ["topology.ep", "topology.tp", "topology.pp"],
        "1T etp1": ["topology.tp", "topology.pp"],
    }
    assert "num_query_groups 12 must be a multiple or a divisor of tp 8" in keys["200B on 256"][0].message
    assert "=4 and" in keys["400B on 512"][0].hint and "14 stages of 8" in keys["400B on 512"][0].hint


def test_llama_405b_on_16_stages_needs_its_embedding_and_loss_counted():
    _, problems = found(LLAMA_405B, tp=8, pp=16)
    assert "128 = 16 x 8" in problems[0].hint
    flags = {f"account_for_{what}_in_pipeline_split": True for what in ("embedding", "loss")}
    topology, problems = found(LLAMA_405B, tp=8, pp=16, **flags)
    assert problems == []
    assert topology.layers_of_stage(126) == [7] + [8] * 14 + [7]
    assert found(LLAMA_405B, tp=8, pp=9)[1] == []


@pytest.mark.parametrize(
    ("shape", "batch", "request_", "key", "part"),
    [
        (TINY, BATCH, {"tp": 16}, "topology.tp", "8 attention heads are not a multiple of tp 16"),
        (
            replace(TINY, num_attention_heads=12, num_query_groups=6, kv_channels=32),
            BATCH,
            {"tp": 4},
            "topology.tp",
            "num_query_groups 6 must",
        ),
        (replace(TINY, num_query_groups=3), BATCH, {}, "model.num_query_groups", "8 attention heads"),
        (replace(TINY, ffn_hidden_size=690), BATCH, {"tp": 4}, "topology.tp", "690"),
        (replace(TINY, hidden_size=250), BATCH, {}, "model.num_attention_heads", "250"),
        (replace(TINY, num_query_groups=1, kv_channels=3), BATCH, {"tp": 8}, "topology.tp", "24 + 2 x 3"),
        (TINY, BATCH, {"pp": 3}, "topology.pp", "4 / 3 leaves 1"),
        (TINY, BATCH, {"pp": 2, "vpp": 3}, "topology.vpp", "2 a stage"),
        (TINY, BATCH, {"vpp": 2}, "topology.vpp", "need pp > 1"),
        (
            TINY,
            Batch(1, 3),
            {"pp": 2, "vpp": 2},
            "train.global_batch_size",
            "in groups of pp 2, but there are 3",
        ),
        (
            TINY,
            Batch(2, 9),
            {},
            "train.global_batch_size",
            "9 is not a multiple of micro_batch_size 2 x dp 1",
        ),
        (TINY, Batch(2, 4), {"dp": 4}, "train.global_batch_size", "= 8"),
        (TINY, Batch(0, 4), {}, "train.micro_batch_size", "0"),
        (replace(TINY, seq_length=250), BATCH, {"cp": 2}, "topology.cp", "2 x cp = 4"),
        (replace(TINY, seq_length=252), BATCH, {"tp": 8}, "topology.sequence_parallel", "252"),
        (TINY, BATCH, {"sequence_parallel": True}, "topology.sequence_parallel", "tp > 1"),
        (TINY_MOE, BATCH, {"tp": 2, "sequence_parallel": False}, "topology.sequence_parallel", "tp 2"),
        (TINY, BATCH, {"ep": 2}, "topology.ep", "needs a model with experts"),
        (TINY_MOE, Batch(1, 12), {"ep": 3}, "topology.ep", "4 experts are not a multiple of ep 3"),
        (replace(TINY_MOE, moe_router_topk=5), BATCH, {}, "moe.moe_router_topk", "5 of 4"),
        (
            replace(TINY_MOE, moe_router_topk=1, moe_router_pre_softmax=False),
            BATCH,
            {},
            "moe.moe_router_topk",
            "softmax",
        ),
        (TINY_MOE, Batch(1, 12), {"etp": 3, "dp": 3}, "topology.etp", "344"),
        (replace(TINY_MOE, add_bias_linear=True), BATCH, {"tp": 2}, "topology.etp", "biases"),
        (
            replace(TINY_MOE, moe_shared_expert_intermediate_size=33),
            BATCH,
            {"tp": 2},
            "moe.moe_shared_expert_intermediate_size",
            "33",
        ),
        (replace(TINY_MOE, moe_layer_freq="[1,0]"), BATCH, {}, "moe.moe_layer_freq", "2 layers"),
        (replace(TINY_MOE, moe_layer_freq="__import__('os')"), BATCH, {}, "moe.moe_layer_freq", "neither"),
        (
            TINY,
            BATCH,
            {"pp": 2, "decoder_first_pipeline_num_layers": 4},
            "topology.decoder_first_pipeline_num_layers",
            "0 of 4 layers remain for 1 other",
        ),
        (
            TINY,
            BATCH,
            {
                "pp": 2,
                "decoder_first_pipeline_num_layers": 1,
                "account_for_loss_in_pipeline_split": True,
            },
            "topology.decoder_first_pipeline_num_layers",
            "together",
        ),
        (replace(TINY, num_layers=0), BATCH, {}, "model.num_layers", "at least 1"),
    ],
)
def test_one_mistake_is_one_problem_with_its_numbers(shape, batch, request_, key, part):
    _, problems = found(shape, batch, **request_)
    assert [problem.key for problem in problems] == [key]
    assert part in problems[0].message


@pytest.mark.parametrize(
    "request_",
    [
        {"tp": 2},
        {"tp": 4},
        {"tp": 8},
        {"tp": 2, "sequence_parallel": False},
        {"pp": 2, "vpp": 2},
        {"pp": 2, "vpp": 1},
        {"pp": 2, "decoder_first_pipeline_num_layers": 1},
        {"pp": 3, "decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 1},
        {"cp": 8, "dp": 2},
    ],
)
def test_what_megatron_runs_is_not_refused(request_):
    assert found(TINY, Batch(2, 16), **request_)[1] == []


def test_two_stages_interleave_only_with_overlapped_communication():
    topology, _ = resolve(TopologyConfig(pp=2, vpp=2))
    assert violations(topology, TINY, BATCH) == []
    assert "pp > 2" in violations(topology, TINY, BATCH, overlap_p2p_comm=False)[0].message


@pytest.mark.parametrize(
    "named",
    [
        {"decoder_first_pipeline_num_layers": 7},
        {"decoder_last_pipeline_num_layers": 7},
        {"decoder_first_pipeline_num_layers": 7, "decoder_last_pipeline_num_layers": 4},
    ],
    ids=["first", "last", "both"],
)
def test_pipeline_sizes_that_are_proposed_beside_named_stages_do_fit(named):
    """What is proposed is typed; the layers of the named stages stay as they are."""
    shape = replace(LLAMA_405B, num_layers=32)
    _, problems = found(shape, pp=4, **named)
    (hint,) = [problem.hint for problem in problems if "remain for" in problem.message]
    sizes = [int(size) for size in hint.removeprefix("pipeline sizes that fit: ").split(", ")]
    assert len(sizes) >= 2
    for size in sizes:
        assert found(shape, pp=size, **named)[1] == []
