"""Every configuration of a small cluster, by asking `violations` of every product of sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import estimate
from megaplug.plan.search.space import Space, layouts
from megaplug.plan.step_time import step_time
from megaplug.plan.workload import Workload
from megaplug.topology import Batch, Topology, violations

A_LITTLE = 1e-9
"""What one formula may differ by, asked for a column and for one job."""


def by_brute_force(space: Space, *, both: bool = False) -> Iterator[tuple[Topology, int]]:
    """Every legal mesh with every microbatch.

    Args:
        space: What is searched; nothing of it may be fixed.
        both: Whether a mesh is told with and without sequence parallelism; else with it, where it can be.
    """
    world_size, shape = space.world_size, space.shape
    every = range(1, world_size + 1)
    experts = every if shape.is_moe else [1]
    for tp, pp, cp in itertools.product(every, every, every):
        if world_size % (tp * pp * cp):
            continue
        dp = world_size // (tp * pp * cp)
        for ep, etp, layout, vpp, micro in itertools.product(
            experts,
            every if shape.is_moe else [tp],
            layouts(shape.num_layers, pp),
            [None, *range(2, shape.num_layers + 2)],
            range(1, 9),
        ):
            if world_size % (etp * ep * pp) or space.global_batch_size % micro:
                continue
            for with_sp in (True, False) if tp > 1 else (False,):
                mesh = Topology(
                    tp, pp, vpp, cp, ep, etp, dp, world_size, with_sp,
                    layout.first, layout.last, layout.embedding, layout.loss,
                )  # fmt: skip
                batch = Batch(micro, space.global_batch_size)
                if not violations(mesh, shape, batch, overlap_p2p_comm=space.overlap_p2p_comm):
                    yield mesh, micro
                    if not both:
                        break


@dataclass(frozen=True)
class Point:
    """A configuration that fits.

    Attributes:
        workload: It.
        memory: Bytes of the fullest rank.
        seconds: Of a step.
    """

    workload: Workload
    memory: float
    seconds: float

    def beats(self, other: Point) -> bool:
        """Whether it is better in one and not worse in the other."""
        worse, better = 1 + A_LITTLE, 1 - A_LITTLE
        return (
            self.memory <= worse * other.memory
            and self.seconds <= worse * other.seconds
            and (self.memory < better * other.memory or self.seconds < better * other.seconds)
        )

    def equals(self, other: Point) -> bool:
        """Whether both figures are the same."""
        return (
            abs(self.memory - other.memory) <= A_LITTLE * other.memory
            and abs(self.seconds - other.seconds) <= A_LITTLE * other.seconds
        )


def points(space: Space, template: Workload, cluster: Cluster, *, both: bool = True) -> list[Point]:
    """All that fit, each asked for alone; the fastest first."""
    found = []
    for mesh, micro in by_brute_force(space, both=both):
        for recompute in space.recomputes:
            batch = Batch(micro, space.global_batch_size)
            workload = replace(template, topology=mesh, batch=batch, recompute=recompute)
            memory = estimate(workload).total
            if memory <= cluster.usable_memory:
                found.append(Point(workload, memory, step_time(workload, cluster).total))
    return sorted(found, key=lambda point: (point.seconds, point.memory))


def unbeaten(every: list[Point]) -> list[Point]:
    """The Pareto front, by comparing each with each."""
    return [point for point in every if not any(other.beats(point) for other in every)]
