"""Process groups of the world and of one rank against Megatron's ``RankGenerator``, and their nodes."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter

import pytest

from megaplug.topology import (
    GROUPS,
    Topology,
    coordinates,
    group_of,
    group_size,
    groups_of,
    members_in_node,
    node_of,
    rank_groups,
    stays_in_node,
)

DENSE = ("tp", "cp", "dp", "pp", "tp_cp", "dp_cp", "tp_pp")
EXPERT = {"etp": "tp", "ep": "ep", "expert_dp": "dp", "etp_ep": "tp-ep", "pp": "pp"}


def topology(tp, pp, cp, dp, ep, etp) -> Topology | None:
    world_size = tp * pp * cp * dp
    return None if world_size % (etp * ep * pp) else Topology(tp, pp, None, cp, ep, etp, dp, world_size)


def small_topologies() -> list[Topology]:
    every = itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 4), (1, 2, 4), (1, 2))
    return [found for sizes in every if (found := topology(*sizes)) is not None]


def random_topologies(count: int) -> list[Topology]:
    """Worlds up to 1,500 ranks, odd ones too; half of them with an expert mesh of its own."""
    draw, found = random.Random(5), []
    while len(found) < count:
        tp, pp, cp = draw.choice((1, 2, 3, 4, 6, 8)), draw.choice((1, 2, 3, 5, 8)), draw.choice((1, 2, 3, 4))
        dp = draw.choice((1, 2, 3, 5, 6, 7, 8, 12, 16))
        ep, etp = draw.choice((1, 2, 3, 4, 5, 6, 8, 16)), draw.choice((1, 2, 3, tp))
        mesh = topology(tp, pp, cp, dp, ep, etp)
        if mesh is not None and mesh.world_size <= 1500 and (mesh.ep > 1 or len(found) % 2):
            found.append(mesh)
    return found


def test_our_rank_groups_are_megatrons():
    from megatron.core.parallel_state import RankGenerator

    seen: Counter[str] = Counter()
    for mesh in small_topologies() + random_topologies(300):
        ours = rank_groups(mesh)
        assert tuple(ours) == GROUPS
        order = "tp-cp-ep-dp-pp"
        dense = RankGenerator(tp=mesh.tp, ep=1, dp=mesh.dp, pp=mesh.pp, cp=mesh.cp, order=order)
        experts = RankGenerator(tp=mesh.etp, ep=mesh.ep, dp=mesh.expert_dp, pp=mesh.pp, cp=1, order=order)
        for name in DENSE:
            assert ours[name] == dense.get_ranks(name.replace("_", "-")), (mesh, name)
        for name, token in EXPERT.items():
            assert ours[name] == experts.get_ranks(token), (mesh, name)
        seen["cp"] += mesh.cp > 1
        seen["etp"] += mesh.etp not in (1, mesh.tp)
        seen["odd dp"] += mesh.dp % 2 and mesh.dp > 1
    assert min(seen["cp"], seen["etp"], seen["odd dp"]) > 60, seen


def test_the_groups_of_a_rank_are_those_of_the_world_that_it_is_in():
    draw = random.Random(6)
    for mesh in small_topologies() + random_topologies(60):
        world = rank_groups(mesh)
        rank = draw.randrange(mesh.world_size)
        found = groups_of(mesh, rank)
        for name, groups in world.items():
            assert found[name] == next(group for group in groups if rank in group), (mesh, name, rank)
            assert {len(group) for group in groups} == {group_size(mesh, name)}, (mesh, name)


@pytest.mark.parametrize("gpus_per_node", [1, 2, 4, 6, 8, 72])
def test_whether_a_group_stays_in_a_node_is_what_its_ranks_say(gpus_per_node):
    answers: Counter[bool] = Counter()
    for mesh in small_topologies() + random_topologies(40):
        for name, groups in rank_groups(mesh).items():
            nodes = [{node_of(rank, gpus_per_node) for rank in group} for group in groups]
            stays = all(len(found) == 1 for found in nodes)
            assert stays_in_node(mesh, name, gpus_per_node) == stays, (mesh, name)
            on_first = sum(rank < gpus_per_node for rank in groups[0])
            assert members_in_node(mesh, name, gpus_per_node) == on_first, (mesh, name)
            answers[stays] += 1
    assert min(answers[True], answers[False]) > 100, answers


def test_a_rank_of_a_large_world_is_placed_at_once():
    mesh = Topology(8, 16, None, 2, 64, 1, 256, 8 * 16 * 2 * 256)
    start = time.perf_counter()
    for rank in range(0, mesh.world_size, 1024):
        assert len(groups_of(mesh, rank)["dp_cp"]) == 512
        assert coordinates(mesh, rank)["pp"] == rank // 4096
    for name in GROUPS:
        assert group_size(mesh, name) == math.prod(mesh_size(mesh, key) for key in parts(name))
        assert members_in_node(mesh, name, 8) <= 8
    assert time.perf_counter() - start < 0.5


def parts(name: str) -> list[str]:
    return [name] if name == "expert_dp" else name.split("_")


def mesh_size(mesh: Topology, key: str) -> int:
    return (mesh.dense_sizes | mesh.expert_sizes)[key]


def test_a_rank_or_a_group_that_is_not_there_is_named():
    mesh = Topology(2, 1, None, 1, 1, 2, 1, 2)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        groups_of(mesh, 2)
    with pytest.raises(KeyError, match="no process group 'xp'"):
        group_of(mesh, "xp", 0)
