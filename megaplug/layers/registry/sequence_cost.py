"""What attention over ranks that share a sequence computes and receives: counted in integers, without torch.

A second count beside ``layers/attention/describe.py``, which asks the plan of the messages themselves: this
one knows no messages and goes through branches only, so a planner can ask it thousands of times. A test holds
that both agree.

A branch is a segment's length w and a rate r: of each segment a head of offset s reads the rows s, s + r, ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SequenceSizes:
    """Of one layer: tokens of a whole sequence, all its heads, and the ranks that share the sequence."""

    num_tokens: int
    num_heads: int
    num_groups: int
    num_ranks: int = 1


@dataclass(frozen=True)
class SequenceCost:
    """Of one layer and one sequence, causal, all heads together; of the rank that has most of each.

    Attributes:
        pairs: Queries times keys that are computed.
        received: Keys that arrive in a forward pass, a token counted once for each group that it comes for;
            as many values come with them.
        is_joint: Whether blocks of rows are merged one after another, and a rank is sent only what it needs
            (``layers/attention/joint.py``).
        arriving: Of ``received``, what comes at once.
        one_way: Whether the rank that receives most sends nothing: the last of contiguous tokens.
        calls: Of each branch its rate, the largest part of a rank's rows that one call of the kernel takes
            of segments that are whole on the rank, and of segments that are not. The first call of all, if it
            takes all rows of all heads, is left out: nothing is there that it could be merged with.
    """

    pairs: int
    received: int = 0
    is_joint: bool = False
    arriving: float = 0.0
    one_way: bool = False
    calls: tuple[tuple[int, float, float], ...] = ()


def dense(sizes: SequenceSizes, params: Mapping[str, Any]) -> SequenceCost:
    """Every token with every one before it; over several ranks Transformer Engine's balanced ring."""
    pairs = sizes.num_heads * sizes.num_tokens * (sizes.num_tokens + 1) // 2
    local = sizes.num_tokens // sizes.num_ranks
    return SequenceCost(-(-pairs // sizes.num_ranks), (sizes.num_ranks - 1) * local * sizes.num_groups)


def ring(sizes: SequenceSizes, params: Mapping[str, Any]) -> SequenceCost:
    """One segment of all tokens."""
    cost = _over_ranks(sizes, ((sizes.num_tokens, 1),), params.get("token_layout", "zigzag"), "kv_group")
    return _in_blocks(cost, sizes, params.get("block_size"))


def dilated(sizes: SequenceSizes, params: Mapping[str, Any]) -> SequenceCost:
    """The branches that the parameters name; without any a quarter, a half and the whole of the sequence."""
    lengths, rates = params.get("segment_lengths") or (), params.get("dilation_rates") or ()
    branches = tuple(zip(lengths, rates, strict=True))
    if not branches:
        branches = tuple((max(1, sizes.num_tokens // part), rate) for part, rate in ((4, 1), (2, 2), (1, 4)))
    layout, rule = params.get("token_layout", "zigzag"), params.get("offset", "kv_group")
    return _in_blocks(_over_ranks(sizes, branches, layout, rule), sizes, params.get("block_size"))


def _in_blocks(cost: SequenceCost, sizes: SequenceSizes, block_size: int | None) -> SequenceCost:
    """Where no message has more than the keys of so many tokens."""
    if block_size is None:
        return cost
    return dataclasses.replace(cost, arriving=min(cost.arriving, block_size * sizes.num_groups))


@functools.lru_cache(maxsize=1024)
def _over_ranks(
    sizes: SequenceSizes, branches: tuple[tuple[int, int], ...], layout: str, rule: str
) -> SequenceCost:
    pairs: Counter[int] = Counter()
    received: Counter[int] = Counter()
    arriving = [0.0] * sizes.num_ranks
    calls = []
    local = sizes.num_tokens // sizes.num_ranks
    for number, (length, rate) in enumerate(branches):
        heads, groups = _offsets(sizes, rule, rate)
        # Messages go to ranks at every distance that the segment spans.
        piece = local if layout == "contiguous" else max(1, local // 2)
        distances = max(1, min(sizes.num_ranks, -(-length // piece)) - 1)
        whole = split = 0
        for rank in range(sizes.num_ranks):
            for offset, count in heads.items():
                found = _of_rank(sizes, layout, rank, length, rate, offset)
                pairs[rank] += count * found.pairs
                received[rank] += groups[offset] * found.received
                arriving[rank] += groups[offset] * found.received / distances
                whole, split = max(whole, found.whole), max(split, found.split)
        if number == 0 and whole == local and len(heads) == 1:
            whole = 0
        calls.append((rate, whole / local, split / local))
    return SequenceCost(
        pairs=max(pairs.values()),
        received=max(received.values()),
        is_joint=True,
        arriving=max(arriving),
        one_way=layout == "contiguous",
        calls=tuple(calls),
    )


def head_offsets(sizes: SequenceSizes, rule: str, rate: int) -> list[int]:
    """The offset of every head in a branch of that rate."""
    heads = range(sizes.num_heads)
    if rule == "kv_group":
        return [head // (sizes.num_heads // sizes.num_groups) % rate for head in heads]
    if rule == "query_head":
        return [head % rate for head in heads]
    return [head // -(-sizes.num_heads // rate) for head in heads]


def _offsets(sizes: SequenceSizes, rule: str, rate: int) -> tuple[Counter[int], Counter[int]]:
    """How many heads have each offset, and how many groups have a head of it."""
    per_group = sizes.num_heads // sizes.num_groups
    of_head = head_offsets(sizes, rule, rate)
    of_group = {(head // per_group, offset) for head, offset in enumerate(of_head)}
    return Counter(of_head), Counter(offset for _, offset in of_group)


@dataclass(frozen=True)
class _Found:
    """Of one head of one branch on one rank: pairs, keys that it lacks, rows of the largest calls."""

    pairs: int
    received: int
    whole: int
    split: int


def _of_rank(sizes: SequenceSizes, layout: str, rank: int, length: int, rate: int, offset: int) -> _Found:
    pairs = most_whole = 0
    # Of each segment that is not whole here: rows here, and rows before the last of them, here or elsewhere.
    here: Counter[int] = Counter()
    before: dict[int, int] = {}
    for start, stop in _ranges(layout, rank, sizes):
        first, last = -(-start // length), stop // length
        whole = max(0, last - first)
        rows = _rows(length, offset, rate)
        pairs += whole * (rows * (rows + 1) // 2)
        most_whole = max(most_whole, whole * rows)
        for begin, end in _ends(start, stop, length):
            number = begin // length
            skipped = _rows(begin - number * length, offset, rate)
            count = _rows(end - number * length, offset, rate) - skipped
            pairs += count * skipped + count * (count + 1) // 2
            if count:
                here[number] += count
                before[number] = skipped + count
    lacking = sum(before[number] - here[number] for number in before)
    return _Found(pairs, lacking, most_whole, max(here.values(), default=0))


def _ends(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a range before its first whole segment and after its last."""
    if start // length == (stop - 1) // length:
        if start % length or stop % length:
            yield start, stop
        return
    if start % length:
        yield start, -(-start // length) * length
    if stop % length:
        yield stop // length * length, stop


def _ranges(layout: str, rank: int, sizes: SequenceSizes) -> list[tuple[int, int]]:
    """What a rank holds of the sequence, in the order of tokens."""
    if layout == "contiguous" or sizes.num_ranks == 1:
        part = sizes.num_tokens // sizes.num_ranks
        return [(rank * part, (rank + 1) * part)]
    part = sizes.num_tokens // (2 * sizes.num_ranks)
    other = 2 * sizes.num_ranks - 1 - rank
    return [(rank * part, (rank + 1) * part), (other * part, (other + 1) * part)]


def _rows(length: int, offset: int, rate: int) -> int:
    """How many of ``offset, offset + rate, ...`` lie below ``length``."""
    return max(0, -(-(length - offset) // rate))
