"""Branches whose pairs lie in one another, each pair of a query and a key computed once.

Where segments are made of the segments of a branch before, and rows are some of its rows, a pair within one
of those smaller segments is a pair of that branch already. There it is computed, and counts as often as
branches have it (``Repeats``); the later branch computes the pairs between the smaller segments. These are
rectangles off the diagonal, of which kernels compute no more than is asked; of a causal square they compute
whole blocks along the diagonal, too.

It is the same softmax: dilated branches together are one, in which a pair of M branches has the score
``s + log M`` (LongNet, arXiv 2307.02486, eq. 9-10).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megaplug.layers.attention.calls import Call, Repeats, Rows
from megaplug.layers.attention.pattern import Branch, Heads, HeadSet, head_sets
from megaplug.layers.attention.token_layout import TokenLayout

# The pairs that are saved are fewer by the square of this, and all others of the branch before cost an eighth
# more for being weighed. Measured on a CPU, of two branches: 0.84 of the time at 2, 0.89 at 3, 0.98 at 4.
_MOST_RATE = 3
# Parts of a segment that are computed one after another.
_MOST_PARTS = 5


@dataclass(frozen=True)
class _Link:
    """A branch of a chain: its number in the pattern, and the offset of each key-value group."""

    number: int
    length: int
    rate: int
    offsets: tuple[int, ...]


def nested_calls(
    pattern: tuple[Branch, ...],
    layout: TokenLayout,
    rank: int,
    heads: Heads,
    rule: str,
    causal: bool,
    most_weighed: int,
) -> dict[int, tuple[Call, ...]]:
    """The calls of those branches that nest, by their numbers in the pattern; empty where none do.

    Only segments that this rank has whole, without a shorter one at the end, and heads that have the offset
    of their group, one group after the other. The arguments are those of ``share_of_rank``.
    """
    calls: dict[int, tuple[Call, ...]] = {}
    for chain in _chains(pattern, layout, rank, heads, rule, most_weighed):
        found = (
            _calls_of_link(chain, place, heads, rule, causal, tuple(_ranges(layout, rank)))
            for place in range(len(chain))
        )
        weighed = {link.number: each for link, each in zip(chain, found, strict=True) if each is not None}
        if len(weighed) == len(chain) > 1:
            calls |= weighed
    return calls


def _calls_of_link(
    chain: Sequence[_Link],
    place: int,
    heads: Heads,
    rule: str,
    causal: bool,
    ranges: Sequence[tuple[int, int]],
) -> tuple[Call, ...] | None:
    """The calls of one branch of a chain, of the first for all pairs; None where they cannot be weighed."""
    link, later = chain[place], chain[place + 1 :]
    found: list[Call] = []
    for head_set in head_sets(heads, rule, link.rate):
        repeats = _repeats(link, later, head_set)
        if repeats is None and later:
            return None
        for base, tokens in ranges:
            room = _Room(link, head_set.offset, base, tokens)
            if place:
                parts = _between(room, chain[place - 1].length, causal)
                found += [Call(head_set, *each, causal=False, repeats=repeats) for each in parts]
            else:
                rows = room.rows(link.length, 0, link.length)
                found.append(Call(head_set, rows, rows, causal, repeats=repeats))
    return tuple(found)


def _chains(
    pattern: tuple[Branch, ...], layout: TokenLayout, rank: int, heads: Heads, rule: str, most_weighed: int
) -> list[list[_Link]]:
    """Branches that nest, each in the one before; a segment beyond the sequence is as long as that."""
    chains: list[list[_Link]] = []
    for number, branch in enumerate(pattern):
        length = min(branch.segment_length, layout.num_tokens)
        offsets = _offsets_of_groups(heads, rule, branch.rate)
        is_whole = all(not token % length for limits in layout.ranges(rank) for token in limits)
        if not is_whole or offsets is None:
            continue
        link = _Link(number, length, branch.rate, offsets)
        for chain in chains:
            # Every smallest segment has to begin in the same way.
            if not chain[0].length % link.rate and _nests(chain[-1], link, most_weighed):
                chain.append(link)
                break
        else:
            chains.append([link])
    return chains


def _offsets_of_groups(heads: Heads, rule: str, rate: int) -> tuple[int, ...] | None:
    """The offset of each key-value group; None where heads of one group differ."""
    offsets = heads.offsets(rule, rate)
    per_group = heads.num_heads // heads.num_groups
    found = [offsets[first : first + per_group] for first in range(0, heads.num_heads, per_group)]
    return None if any(len(set(each)) > 1 for each in found) else tuple(each[0] for each in found)


def _nests(inner: _Link, outer: _Link, most_weighed: int) -> bool:
    """Whether all pairs of the outer branch within one segment of the inner are its pairs; and it pays."""
    return (
        (inner.length // inner.rate) ** 2 <= most_weighed
        and not outer.length % inner.length
        and not outer.rate % inner.rate
        and outer.rate <= _MOST_RATE * inner.rate
        and max(_prime_factors(outer.length // inner.length), default=1) <= _MOST_PARTS
        and all(o % inner.rate == i for i, o in zip(inner.offsets, outer.offsets, strict=True))
    )


def _repeats(link: _Link, later: Sequence[_Link], heads: HeadSet) -> Repeats | None:
    """How many later branches have each of a branch's rows; None where groups do not follow each other."""
    if not later:
        return None
    groups = range(len(link.offsets))[heads.groups.slice]
    period = later[-1].rate // link.rate
    # The last branch's offset tells those of all before.
    starts = [(later[-1].offsets[group] - heads.offset) // link.rate for group in groups]
    shift = (starts[0] - starts[1]) % period if len(starts) > 1 else 0
    if any((start + n * shift - starts[0]) % period for n, start in enumerate(starts)):
        return None
    return Repeats(
        tuple(
            sum((heads.offset + row * link.rate) % each.rate == each.offsets[groups[0]] for each in later)
            for row in range(period)
        ),
        shift,
    )


def _ranges(layout: TokenLayout, rank: int) -> Iterator[tuple[int, int]]:
    """Where in a rank's tensors each of its ranges begins, and how many tokens it has."""
    place = 0
    for start, stop in layout.ranges(rank):
        yield place, stop - start
        place += stop - start


@dataclass(frozen=True)
class _Room:
    """A branch's rows in one range of a rank's tensors."""

    link: _Link
    offset: int
    base: int
    tokens: int

    def rows(self, length: int, first: int, count: int) -> tuple[Rows, ...]:
        """Of each ``length`` tokens those from ``first`` on, ``count`` of them; nothing of none."""
        rate, segments = self.link.rate, self.tokens // length
        found = Rows(self.base, self.offset + first, count // rate, rate, segments, length)
        return (found,) if count else ()


def _between(room: _Room, inner: int, causal: bool) -> Iterator[tuple[tuple[Rows, ...], tuple[Rows, ...]]]:
    """Pairs between the segments of length ``inner`` within the longer ones of a branch.

    Twice as long at a time, or by another prime factor: first pairs of neighbours, then neighbours of these,
    so that many are computed at once.
    """
    for factor in _prime_factors(room.link.length // inner):
        whole = inner * factor
        for first in range(0, whole, inner):
            after = 0 if causal else whole - first - inner
            if keys := room.rows(whole, 0, first) + room.rows(whole, first + inner, after):
                yield room.rows(whole, first, inner), keys
        inner = whole


def _prime_factors(number: int) -> list[int]:
    found, factor = [], 2
    while factor * factor <= number:
        while not number % factor:
            found.append(factor)
            number //= factor
        factor += 1
    return found + [number] * (number > 1)
