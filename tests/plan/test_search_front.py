"""The rows and the Pareto front of a search are those of every legal configuration, asked one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from search_by_force import Point, by_brute_force, points, unbeaten

from megaplug.errors import Problem
from megaplug.job.checks import job_shape
from megaplug.job.compose import compose_job
from megaplug.plan.cluster import GIB, Cluster, cluster_preset
from megaplug.plan.search.answer import MOST_REFUSED, Answer, Row, find
from megaplug.plan.search.grids import legal
from megaplug.plan.search.space import Space, micro_batches, recomputes
from megaplug.plan.search.tally import BATCH, LAYERS, tally_of
from megaplug.plan.search.text import spread
from megaplug.plan.workload import Workload, workload_of
from megaplug.topology import Topology

Small = tuple[Space, Workload, Cluster]


def small(*words: str, world_size: int, batch: int, memory_gib: float) -> Small:
    """A model of few layers on few GPUs, whose memory is too little for a part of the configurations."""
    job = compose_job([*words, f"train.global_batch_size={batch}", "precision=bf16"])
    shape = job_shape(job, job.model.vocab_size)
    choices = recomputes(shape, fused_attention=True, grouped_experts=False)
    space = Space(shape, world_size, batch, micro_batches(batch), choices)
    template = workload_of(job, Topology(1, 1, None, 1, 1, 1, 1, 1), shape)
    h100 = cluster_preset("h100")
    return space, template, replace(h100, memory=memory_gib * GIB, reserved=0.0)


CLUSTERS: dict[str, Callable[[], Small]] = {
    "dense": lambda: small(
        "model=llama3_8b", "model.num_layers=4", world_size=8, batch=8, memory_gib=12
    ),
    "uneven stages": lambda: small(
        "model=llama3_8b", "model.num_layers=5", world_size=6, batch=12, memory_gib=16
    ),
    "experts": lambda: small(
        "model=mixtral_8x7b", "model.num_layers=2", "model.seq_length=4096", world_size=4, batch=4,
        memory_gib=24,
    ),
    "first layer dense": lambda: small(
        "model=deepseek_v2_lite", "model.num_layers=3", "moe.moe_layer_freq='[0,1,1]'", world_size=4, batch=8,
        memory_gib=12,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> tuple[Small, list[Point]]:
    found = CLUSTERS[request.param]()
    return found, points(*found)


def point(row: Row) -> Point:
    assert row.time is not None
    return Point(row.workload, row.memory.total, row.time.total)


def is_front(answer: Answer, every: list[Point]) -> None:
    """No configuration beats a row of the front, and none that is unbeaten is missing."""
    front, true = [point(row) for row in answer.front], unbeaten(every)
    assert [row.workload for row in answer.front if not any(point(row).equals(one) for one in true)] == []
    assert [one.workload for one in true if not any(one.equals(shown) for shown in front)] == []
    assert [shown.seconds for shown in front] == sorted(shown.seconds for shown in front)
    assert all(row.on_front for row in answer.front)


def test_the_front_is_that_of_every_legal_configuration(cluster):
    """With and without sequence parallelism: that a search leaves the latter out loses nothing."""
    (space, template, machines), every = cluster
    answer = find(space, template, machines, top=3)
    assert 0 < answer.num_fit < answer.num_legal
    is_front(answer, every)
    assert len(answer.front) > 3


def test_the_rows_are_the_fastest_of_every_legal_configuration(cluster):
    (space, template, machines), every = cluster
    answer = find(space, template, machines, top=25)
    fastest = [
        one.seconds
        for one in every
        if one.workload.topology.sequence_parallel or one.workload.topology.tp == 1
    ]
    assert [row.time.total for row in answer.rows] == pytest.approx(fastest[:25], rel=1e-9)
    front = answer.front
    assert [row.on_front for row in answer.rows] == [row in front for row in answer.rows]


def test_what_the_rest_of_the_job_forbids_is_on_neither(cluster):
    """What is forbidden beats nothing either: the front is that of what can be run."""
    (space, template, machines), every = cluster
    # What the best of all beat is best now.
    best = [row.workload for row in find(space, template, machines).front]

    def forbids(workload: Workload) -> list[Problem]:
        mesh = replace(workload.topology, sequence_parallel=workload.topology.tp > 1)
        with_sp = replace(workload, topology=mesh)
        return [Problem("train.recompute", "not with this")] if with_sp in best[::2] else []

    answer = find(space, template, machines, top=4, problems_of=forbids)
    possible = [one for one in every if not forbids(one.workload)]
    assert len(answer.rows) == 4 and len(possible) < len(every)
    is_front(answer, possible)
    assert sum(answer.refused.values()) > 0
    assert not answer.gave_up
    assert answer.rows[0].time.total == pytest.approx(possible[0].seconds, rel=1e-9)
    assert answer.rows[0].near_first


def test_where_nearly_all_is_forbidden_a_search_gives_up_and_says_so(cluster):
    (space, template, machines), _ = cluster
    answer = find(space, template, machines, problems_of=lambda workload: [Problem("", "never")])
    assert answer.rows == answer.front == []
    assert answer.refused == {"never": min(MOST_REFUSED, answer.num_fit)}
    assert answer.gave_up == (answer.num_fit >= MOST_REFUSED)


def test_without_a_front_the_rows_are_the_same(cluster):
    (space, template, machines), _ = cluster
    with_front, without = (
        find(space, template, machines, top=5, with_front=wanted) for wanted in (True, False)
    )
    assert without.rows == with_front.rows
    assert without.front == []


def keeps(mesh: tuple[int, ...], fixed: dict[str, int], world_size: int) -> bool:
    """Whether a mesh (tp, pp, cp, ep, etp) has the fixed sizes."""
    sizes = dict(zip(("tp", "pp", "cp", "ep", "etp"), mesh, strict=True))
    sizes["dp"] = world_size // (mesh[0] * mesh[1] * mesh[2])
    return all(sizes[name] == size for name, size in fixed.items())


def test_every_pair_of_grids_is_legal_or_forbidden_by_a_rule(cluster):
    (space, _, _), _ = cluster
    tally = tally_of(legal(space))
    sizes = range(1, space.world_size + 1)
    # Of attention (tp, cp, pp), and of experts (ep, etp, pp).
    grids = [grid for grid in itertools.product(sizes, repeat=3) if space.world_size % math.prod(grid) == 0]
    pairs = [one for one in grids for other in (grids if space.shape.is_moe else [one]) if one[2] == other[2]]
    assert tally.num_grids == len(pairs)
    meshes = {(mesh.tp, mesh.pp, mesh.cp, mesh.ep, mesh.etp) for mesh, _ in by_brute_force(space)}
    assert tally.num_legal == len(meshes)
    assert tally.num_grids == tally.num_legal + sum(tally.broken.values())
    for fixed in ({"tp": 2}, {"cp": 1}, {"pp": 2, "dp": 1}, {"ep": 1}):
        held = tally_of(legal(replace(space, fixed=fixed)))
        assert held.num_grids == tally.num_grids
        assert held.num_legal == len({mesh for mesh in meshes if keeps(mesh, fixed, space.world_size)})
        assert held.num_grids == held.num_legal + sum(held.broken.values())
    assert all(count > 0 for count in tally.broken.values())
    assert list(tally.broken.values()) == sorted(tally.broken.values(), reverse=True)


def test_rules_are_counted_where_they_forbid():
    space, _, _ = CLUSTERS["dense"]()
    # 4 layers cannot be dealt out to 8 stages; a batch of 8 goes with every number of replicas.
    assert tally_of(legal(space)).broken == {LAYERS: 1}
    seven = replace(space, global_batch_size=7, micro_batches=micro_batches(7))
    assert set(tally_of(legal(seven)).broken) == {BATCH, LAYERS}
    assert tally_of(legal(replace(space, fixed={"tp": 2}))).broken == {LAYERS: 1, "tp is to be 2": 13}
    why = replace(space, fixed={"cp": 1}, fixed_by={"cp": "no attention cuts it"})
    assert tally_of(legal(why)).broken["cp > 1: no attention cuts it"] == 10


def test_a_spread_ends_with_the_last():
    assert spread([1, 2, 3], 3) == [1, 2, 3]
    assert spread(list(range(10)), 5) == [1, 3, 5, 7, 9]
    assert spread(list(range(7)), 3) == [1, 3, 6]
