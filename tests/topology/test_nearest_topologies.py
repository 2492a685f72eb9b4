"""What is suggested in place of a topology that cannot be, on the seed topologies of the planner."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_topology_rules import BATCH, LLAMA_405B, SEED_1T, SEED_30B, SEED_200B, SEED_400B, TINY, TINY_MOE

from megaplug.job.schema import TopologyConfig
from megaplug.topology import Batch, nearest_legal, overrides, resolve, smallest_world, violations
from megaplug.topology.stages import uneven_layout


def stages(end: int) -> list[str]:
    return [f"topology.decoder_{where}_pipeline_num_layers={end}" for where in ("first", "last")]


UNEVEN_400B = stages(4)


def test_the_nearest_mesh_keeps_what_was_asked_for():
    request = TopologyConfig(tp=4, pp=4, ep=16, etp=1, dp=2, world_size=16)
    topology, _ = resolve(request)
    nearest = nearest_legal(topology, SEED_30B, BATCH, request=request)
    assert overrides(nearest[0], request) == ["topology.pp=2", "topology.ep=8"]  # keeps TP4 and DP2
    assert overrides(nearest[2], request) == ["topology.pp=1", "topology.dp=4"]  # keeps TP4 and EP16
    for mesh in nearest:
        assert mesh.world_size == 16
        assert violations(mesh, SEED_30B, BATCH) == []


@pytest.mark.parametrize(
    ("shape", "request_", "typed"),
    [
        (SEED_200B, {"tp": 8, "pp": 8, "world_size": 256}, ["topology.tp=4"]),
        (SEED_200B, {"tp": 8, "pp": 8, "world_size": 8}, ["topology.tp=1"]),
        (SEED_400B, {"tp": 8, "pp": 16, "world_size": 128}, UNEVEN_400B),
        (SEED_400B, {"tp": 8, "pp": 16, "world_size": 32}, ["topology.pp=4"]),
        (SEED_400B, {"tp": 8, "pp": 16}, UNEVEN_400B),
        (SEED_400B, {"tp": 8, "pp": 17}, ["topology.pp=15"]),
        (SEED_1T, {"tp": 16, "pp": 32, "etp": 1, "ep": 128}, ["topology.tp=4", "topology.pp=30"]),
        (
            SEED_1T,
            {"tp": 16, "pp": 32, "ep": 128, "world_size": 4096},
            ["topology.tp=4", "topology.pp=16", *stages(5), "topology.etp=1"],
        ),
        (
            LLAMA_405B,
            {"tp": 8, "pp": 8, "world_size": 64},
            [f"topology.account_for_{what}_in_pipeline_split=true" for what in ("embedding", "loss")],
        ),
        (
            SEED_30B,
            {"tp": 4, "pp": 4, "ep": 16, "dp": 2, "world_size": 16},
            ["topology.pp=2", "topology.ep=8", "topology.etp=1"],
        ),
        (TINY, {"tp": 3}, ["topology.tp=4"]),
        (TINY, {"ep": 2}, ["topology.ep=1"]),
        (TINY_MOE, {"tp": 2, "sequence_parallel": False}, ["topology.sequence_parallel=true"]),
    ],
)
def test_what_is_suggested_first(shape, request_, typed):
    request = TopologyConfig(**request_)
    topology, _ = resolve(request)
    nearest = nearest_legal(topology, shape, BATCH, request=request)
    assert overrides(nearest[0], request) == typed


@pytest.mark.parametrize(
    ("shape", "request_", "label", "world_size", "typed"),
    [
        (
            SEED_30B,
            {"tp": 4, "pp": 4, "ep": 16, "dp": 2, "world_size": 16},
            "TP4 PP4 CP2 EP16 ETP1 DP2",
            64,
            ["topology.cp=2", "topology.world_size=64", "topology.etp=1"],
        ),
        (
            SEED_30B,
            {"tp": 4, "pp": 4, "ep": 16, "etp": 4, "world_size": 16},
            "TP4 PP4 EP16 DP16",
            256,
            ["topology.world_size=256"],
        ),
        (
            SEED_200B,
            {"tp": 8, "pp": 8, "world_size": 8},
            "TP4 PP8 DP1",
            32,
            ["topology.tp=4", "topology.world_size=32"],
        ),
        (
            SEED_400B,
            {"tp": 8, "pp": 16, "world_size": 32},
            "TP8 PP16 DP1",
            128,
            ["topology.world_size=128", *UNEVEN_400B],
        ),
        (
            SEED_1T,
            {"tp": 16, "pp": 32, "ep": 128, "world_size": 4096},
            "TP4 PP30 EP128 ETP1 DP32",
            3840,
            ["topology.tp=4", "topology.pp=30", "topology.world_size=3840", "topology.etp=1"],
        ),
        (LLAMA_405B, {"tp": 8, "pp": 9, "dp": 64, "world_size": 8}, "TP8 PP9 DP64", 4608, None),
    ],
)
def test_the_smallest_world_keeps_every_size_that_the_model_allows(shape, request_, label, world_size, typed):
    request = TopologyConfig(**request_)
    topology, _ = resolve(request)
    found = smallest_world(topology, shape, request=request)
    assert (found.label, found.world_size) == (label, world_size)
    assert violations(found, shape, Batch(1, found.dp)) == []
    assert typed is None or overrides(found, request) == typed


def test_no_world_is_large_enough_for_a_model_that_breaks_a_rule_itself():
    topology, _ = resolve(TopologyConfig(tp=2, world_size=3))
    assert smallest_world(topology, replace(TINY, num_query_groups=3)) is None


@pytest.mark.parametrize(
    ("pp", "num_layers", "counts"),
    [
        (16, 126, [7] + [8] * 14 + [7]),
        (4, 7, [2, 2, 2, 1]),
        (16, 120, [4] + [8] * 14 + [4]),
        (16, 150, [5] + [10] * 14 + [5]),
        (16, 61, [3] + [4] * 14 + [2]),  # DeepSeek-V3
        (8, 61, [7] + [8] * 6 + [6]),
        (32, 150, None),  # 15 layers at both ends and 4 between them
        (2, 8, None),  # even already
        (1, 8, None),
        (3, 2, None),
    ],
)
def test_uneven_stages_are_suggested_where_they_balance(pp, num_layers, counts):
    layout = uneven_layout(pp, num_layers)
    if counts is None:
        assert layout == {}
    else:
        topology, _ = resolve(TopologyConfig(pp=pp, **layout))
        assert topology.layers_of_stage(num_layers) == counts


def test_nothing_is_suggested_where_no_mesh_can_help():
    topology, _ = resolve(TopologyConfig(tp=2))
    assert nearest_legal(topology, replace(TINY, num_query_groups=3), BATCH) == []
    assert nearest_legal(topology, TINY, Batch(2, 9)) == []


@pytest.mark.parametrize("free", [True, False])
def test_suggestions_for_a_large_cluster_come_at_once(free):
    import time

    request = TopologyConfig(tp=16, pp=32, ep=128, world_size=None if free else 4096)
    topology, _ = resolve(request)
    start = time.process_time()
    assert len(nearest_legal(topology, SEED_1T, BATCH, request=request)) == 3
    assert time.process_time() - start < 2.0
