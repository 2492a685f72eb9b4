"""What would fit where nothing does: more ranks, or shorter sequences."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import estimate
from megaplug.plan.search.grids import legal
from megaplug.plan.search.score import score
from megaplug.plan.search.space import Space
from megaplug.plan.search.table import least_of
from megaplug.plan.workload import Workload

SHORTEST = 4096
"""Tokens; sequences are not made shorter."""


def least_memory(space: Space, template: Workload, cluster: Cluster) -> tuple[Workload, float] | None:
    """The configuration of a space that needs least, and its bytes; None if there is none that fits."""
    # A larger microbatch never needs less memory, and is never legal where a smaller one is not.
    space = replace(space, micro_batches=(min(space.micro_batches),))
    found = least_of(score(space, legal(space), template, cluster.usable_memory, None), space, template)
    if found is None:
        return None
    needed = estimate(found).total
    return (found, needed) if needed <= cluster.usable_memory else None


def smallest_world(
    space: Space, template: Workload, cluster: Cluster, *, times: int = 64
) -> tuple[Workload, float] | None:
    """What needs least on the first of twice, four times, ... as many ranks on which anything fits."""
    factor = 2
    while factor <= times:
        found = least_memory(replace(space, world_size=factor * space.world_size), template, cluster)
        if found is not None:
            return found
        factor *= 2
    return None


def longest_sequence(space: Space, template: Workload, cluster: Cluster) -> tuple[Workload, float] | None:
    """What needs least with the first of a half, a quarter, ... of the sequence with which anything fits."""
    lengths = [space.shape.seq_length >> by for by in range(1, 32)]
    lengths = [length for length in lengths if length >= SHORTEST]

    def at(length: int) -> tuple[Workload, float] | None:
        shape = replace(space.shape, seq_length=length)
        return least_memory(replace(space, shape=shape), replace(template, shape=shape), cluster)

    # What fits also fits with shorter sequences.
    first = bisect_left(lengths, True, key=lambda length: at(length) is not None)
    return at(lengths[first]) if first < len(lengths) else None
