"""The pattern of dilated attention as integers: segments, rates, and which heads read which rows.

Ding et al. 2023 (LongNet, arXiv 2307.02486), eq. 3-8 and 13-15: the sequence is cut into segments of length
w; of each, a head of offset s reads the rows s, s + r, s + 2r, ... Queries and keys of a head have one
offset, so the order of rows is the order of tokens and a causal mask stays a triangle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megaplug.errors import UserError
from megaplug.layers.attention.given import one_of, whole

OFFSETS = ("kv_group", "query_head", "torchscale_block")


@dataclass(frozen=True)
class Branch:
    """One pair of a segment's length w and a rate r, both in tokens; the last segment may be shorter."""

    segment_length: int
    rate: int


@dataclass(frozen=True)
class Steps:
    """The integers ``start, start + step, ...``, ``count`` of them."""

    start: int
    count: int
    step: int = 1

    @property
    def slice(self) -> slice:
        """As an index of a tensor's dimension."""
        return slice(self.start, self.start + (self.count - 1) * self.step + 1, self.step)


@dataclass(frozen=True)
class HeadSet:
    """Heads of one offset that one call of a kernel can take: as many query heads in each key-value group.

    Attributes:
        offset: The row of a segment that they start at.
        groups: The key-value groups, as this rank counts them.
        heads: The query heads within each of these groups.
    """

    offset: int
    groups: Steps
    heads: Steps


@dataclass(frozen=True)
class Heads:
    """The heads that this rank holds, as tensor parallelism shards them: contiguous parts of all.

    Attributes:
        num_heads: Query heads here.
        num_groups: Key-value groups here; may be copies of one group that several ranks hold.
        first_head: The number of the first query head here among all.
        total_heads: Query heads of the whole layer; None where they are all here.
        heads_per_group: Query heads that share a group in the whole layer; None where all are here.
    """

    num_heads: int
    num_groups: int
    first_head: int = 0
    total_heads: int | None = None
    heads_per_group: int | None = None

    def offsets(self, rule: str, rate: int) -> list[int]:
        """The offset of each query head here.

        ``kv_group`` is the head's group modulo r (LongNet's rule where every head has its own group);
        ``query_head`` is the head modulo r; ``torchscale_block`` gives each block of ``ceil(H / r)`` heads
        one.
        """
        total = self.total_heads or self.num_heads
        per_group = self.heads_per_group or self.num_heads // self.num_groups
        heads = range(self.first_head, self.first_head + self.num_heads)
        if rule == "kv_group":
            return [head // per_group % rate for head in heads]
        if rule == "query_head":
            return [head % rate for head in heads]
        return [head // -(-total // rate) for head in heads]


def branches(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> tuple[Branch, ...]:
    """The pairs, checked.

    Raises:
        UserError: There is none, they are not as many, or one is no positive integer.
    """
    lengths = _numbers("segment_lengths", segment_lengths)
    rates = _numbers("dilation_rates", dilation_rates)
    if len(lengths) != len(rates) or not lengths:
        raise UserError(
            f"{len(lengths)} segment_lengths and {len(rates)} dilation_rates",
            hint="give one rate for each segment length, and at least one of both",
        )
    return tuple(Branch(*pair) for pair in zip(lengths, rates, strict=True))


def _numbers(name: str, values: Iterable[int]) -> list[int]:
    if not isinstance(values, Iterable):
        raise UserError(f"{name} is {values!r}", hint="give a list, with one integer for each branch")
    hint = "lengths and rates are integers of at least 1, in tokens"
    return [whole(name, value, hint, "has") for value in values]


def head_sets(heads: Heads, rule: str, rate: int) -> tuple[HeadSet, ...]:
    """All heads of a rank, in as few sets as their offsets allow.

    Raises:
        UserError: There is no such rule, or the groups do not divide the heads.
    """
    one_of("offset", rule, OFFSETS)
    if heads.num_groups < 1 or heads.num_heads % heads.num_groups:
        raise UserError(f"{heads.num_groups} key-value heads cannot be shared by {heads.num_heads} heads")
    per_group = heads.num_heads // heads.num_groups
    offsets = heads.offsets(rule, rate)
    groups_of: dict[tuple[int, Steps], list[int]] = {}
    for group in range(heads.num_groups):
        here = offsets[group * per_group : (group + 1) * per_group]
        for offset in sorted(set(here)):
            for steps in _progressions([i for i, each in enumerate(here) if each == offset]):
                groups_of.setdefault((offset, steps), []).append(group)
    return tuple(
        HeadSet(offset, groups, steps)
        for (offset, steps), numbers in groups_of.items()
        for groups in _progressions(numbers)
    )


def num_rows(length: int, offset: int, rate: int) -> int:
    """How many of ``offset, offset + rate, ...`` lie below ``length``."""
    return max(0, -(-(length - offset) // rate))


def coverage(heads: Heads, rule: str, rate: int) -> float:
    """The share of a branch's tokens that any head reads: r offsets, of which some may be nobody's."""
    return len(set(heads.offsets(rule, rate))) / rate


def pairs_of_branch(num_tokens: int, branch: Branch, offset: int, *, causal: bool) -> int:
    """Pairs of a query and a key that one head of that offset computes in one branch."""
    whole, tail = divmod(num_tokens, branch.segment_length)
    rows = num_rows(branch.segment_length, offset, branch.rate)
    rest = num_rows(tail, offset, branch.rate)
    if causal:
        return whole * (rows * (rows + 1) // 2) + rest * (rest + 1) // 2
    return whole * rows * rows + rest * rest


def _progressions(numbers: Sequence[int]) -> list[Steps]:
    """Rising numbers as few arithmetic progressions, taken greedily."""
    found: list[Steps] = []
    left = list(numbers)
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = 1
        while count < len(left) and left[count] - left[count - 1] == step:
            count += 1
        found.append(Steps(left[0], count, step if count > 1 else 1))
        left = left[count:]
    return found
