"""What attention that merges blocks of rows needs for a moment (``layers/attention/joint.py``): modelled.

It keeps what flash attention keeps. While it runs, outputs (forward) or gradients of queries, keys and values
(backward) are summed up in fp32; beside them is what one call of the kernel gives, and messages under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megaplug.layers.registry.sequence_cost import SequenceCost
from megaplug.plan.numbers import most
from megaplug.plan.workload import Workload

_FP32 = 4


@dataclass(frozen=True)
class _Sizes:
    """Elements of a rank's queries and of its keys, bytes of one, and what a kernel's call takes inside."""

    queries: float
    keys: float
    size: int
    inside: tuple[float, float]

    @property
    def all(self) -> float:
        """Elements of queries, keys and values."""
        return self.queries + 2 * self.keys


def joint_moments(workload: Workload, cost: SequenceCost, inside: tuple[float, float]) -> tuple[float, float]:
    """Bytes beyond what is kept at the fullest moment, forward and backward.

    Args:
        workload: The job.
        cost: Of one of its attentions.
        inside: What the kernel's backward pass takes for itself if it is called with all rows and heads, by
            rows of queries and of keys.
    """
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    tokens = workload.tokens
    groups = most(shape.num_query_groups / tp, 1)
    sizes = _Sizes(tokens * shape.query_size / tp, tokens * groups * shape.head_size, size, inside)
    narrow = size < _FP32
    under_way = _messages(workload, cost, sizes, forward=True)
    found = (size + _FP32 * narrow) * sizes.queries
    merging = [under_way + part * found for part, *_ in _parts(cost, groups)]
    forward = (_FP32 - size) * sizes.queries + max([size * sizes.queries, *merging])
    # All that the first call gives, beside the wide sums that it becomes; at the end the other way round.
    summed = _FP32 * sizes.all
    first = most(size * sizes.all + sum(inside), summed + narrow * size * sizes.all)
    under_way = _messages(workload, cost, sizes, forward=False)
    calls = [
        summed + share * under_way + _call(sizes, queries, keys, copied)
        for queries, keys, copied, share in _parts(cost, groups)
    ]
    return forward, size * sizes.queries + max([first, *calls])


def _parts(cost: SequenceCost, groups: float) -> Iterator[tuple[float, float, bool, float]]:
    """Of each call the part of all queries and of all keys that it takes, and whether it needs copies.

    The last number is the part of the largest messages that are there with it.
    """
    for rate, whole, split in cost.calls:
        heads = -(-groups // rate) / groups
        # Of several groups that others lie between, heads are no view.
        copied = 1 < rate < groups
        if whole:
            yield whole * heads, whole * heads, copied, 1.0
        if split and cost.one_way:
            yield split * heads, split * heads, copied, 1.0
        elif split:
            # Zigzag: both pieces read another rank's first, or the second one reads both of another rank's.
            yield split * heads, split * heads / 2, copied, 0.5
            yield split * heads / 2, split * heads, copied, 1.0


def _call(sizes: _Sizes, queries: float, keys: float, copied: bool) -> float:
    """What one call of the kernel's backward pass is given and gives."""
    of_queries, of_keys = queries * sizes.queries, keys * sizes.keys
    given = (3 * of_queries + 2 * of_keys) * copied
    # The one fused kernel with fp32 takes a key and a value for each head, and gives gradients of as many.
    given += 4 * keys * sizes.queries * (sizes.size == _FP32 and sizes.keys < sizes.queries)
    inside = queries * sizes.inside[0] + keys * sizes.inside[1]
    return sizes.size * (of_queries + 2 * of_keys + given) + inside


def _messages(workload: Workload, cost: SequenceCost, sizes: _Sizes, *, forward: bool) -> float:
    """What is under way at once: of the fullest step, and of the average one before and after it.

    Forward the next step's keys and values come while this one's are read; backward gradients of the last
    step's are on their way back, too. Who receives most of contiguous tokens sends nothing.
    """
    ranks = workload.topology.cp
    if ranks == 1:
        return 0.0
    own = workload.shape.seq_length / ranks * workload.shape.num_query_groups
    average = min(cost.arriving, cost.received / (ranks - 1))
    others = average * (ranks > 2) * (1 if cost.one_way else 2)
    parts = cost.arriving + others if forward else 2 * (cost.arriving + others)
    return parts / own * 2 * sizes.size * sizes.keys
