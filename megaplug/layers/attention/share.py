"""One rank's share of dilated attention as integers: what it computes, what it sends and what it awaits.

Every rank derives the shares of the others, too, so nothing has to be agreed on. Keys and values go straight
from the rank that has them to each rank with a later query in the same segment, and nowhere else: what
arrives is the causal minimum. In step s a rank sends to the s-th after it and receives from the s-th before
it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megaplug.layers.attention.calls import Call, Rows
from megaplug.layers.attention.nesting import nested_calls
from megaplug.layers.attention.pattern import Branch, Heads, HeadSet, head_sets, num_rows
from megaplug.layers.attention.token_layout import TokenLayout


@dataclass(frozen=True)
class Entry:
    """A part of a message: the keys and values of these groups at these rows."""

    heads: HeadSet
    rows: Rows


@dataclass(frozen=True)
class Step:
    """A message out, a message in, and what is computed with the latter.

    ``sent`` are rows of this rank; ``received`` are rows of the sender, of which only the number counts here.
    """

    to_rank: int
    from_rank: int
    sent: tuple[Entry, ...]
    received: tuple[Entry, ...]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Share:
    """What a rank does.

    Attributes:
        own: What needs no other rank.
        steps: What does, in order.
        num_covering: How many of ``own``, from the first on, together reach every row and head once; 0 where
            none do.
    """

    own: tuple[Call, ...]
    steps: tuple[Step, ...]
    num_covering: int

    @property
    def takes_over(self) -> bool:
        """Whether what one call gives is that of all rows and heads, and may be kept as it is.

        Not where a kernel weighs the heads of a group one after another: put together at once, they would
        need the memory twice.
        """
        first = self.own[0] if self.num_covering == 1 else None
        return first is not None and not (
            first.repeats and first.repeats.shift and first.heads.heads.count > 1
        )

    def elements_received(self, head_dim: int) -> int:
        """Elements of keys and values that arrive in a forward pass, for each sequence of the batch."""
        entries = [entry for step in self.steps for entry in step.received]
        return sum(2 * e.rows.count * e.heads.groups.count * head_dim for e in entries)


@dataclass(frozen=True)
class _Piece:
    """What one range of one rank has of a segment's rows; ``order`` is that of the tokens."""

    rank: int
    order: int
    rows: Rows


@functools.lru_cache(maxsize=64)
def share_of_rank(
    pattern: tuple[Branch, ...],
    layout: TokenLayout,
    rank: int,
    heads: Heads,
    rule: str,
    causal: bool,
    most_weighed: int = 0,
) -> Share:
    """The share of one rank, branch after branch, its own rows before those of others.

    Args:
        pattern: The branches.
        layout: How the tokens are spread.
        rank: Which share, from 0.
        heads: The heads of this rank's tensors; the same on all ranks of the layout.
        rule: How heads get their offsets.
        causal: Whether a token sees only those before it and itself.
        most_weighed: Pairs of a head and segment up to which those that several branches have may be
            computed once, where ``nesting`` can; 0 for kernels that do not weigh pairs.
    """
    nested = nested_calls(pattern, layout, rank, heads, rule, causal, most_weighed)
    own: list[Call] = []
    split: list[tuple[HeadSet, dict[int, list[_Piece]]]] = []
    num_covering = 0
    for number, branch in enumerate(pattern):
        own += nested.get(number, ())
        for head_set in () if number in nested else head_sets(heads, rule, branch.rate):
            own += [
                Call(head_set, (r,), (r,), causal) for r in _whole_segments(branch, layout, rank, head_set)
            ]
            split += [(head_set, each) for each in _split_segments(branch, layout, rank, head_set)]
        if number == 0 and _cover_all(own, layout, heads):
            num_covering = len(own)
    for head_set, pieces in split:
        own += _own_calls(head_set, pieces[rank], causal)
    # A step in which a rank has nothing to say stays where others may have: NCCL wants one order everywhere.
    distances = range(1, layout.num_ranks) if split else ()
    steps = tuple(_step(split, layout, rank, distance, causal) for distance in distances)
    return Share(tuple(own), steps, num_covering)


def _cover_all(calls: Sequence[Call], layout: TokenLayout, heads: Heads) -> bool:
    """Whether calls of one branch's whole segments, which share no row, leave none out."""
    found = sum(
        rows.count * rows.segments * call.heads.groups.count * call.heads.heads.count
        for call in calls
        for rows in call.queries
    )
    return found == layout.num_tokens // layout.num_ranks * heads.num_heads


def _whole_segments(branch: Branch, layout: TokenLayout, rank: int, heads: HeadSet) -> Iterator[Rows]:
    """The segments within one range of a rank: equal ones at once, then the sequence's shorter last one."""
    length, rate, offset = branch.segment_length, branch.rate, heads.offset
    place = 0
    for start, stop in layout.ranges(rank):
        first, last = -(-start // length), stop // length
        rows = num_rows(length, offset, rate)
        if last > first and rows:
            yield Rows(place + first * length - start, offset, rows, rate, last - first, length)
        tail = max(first, last) * length
        rows = num_rows(stop - tail, offset, rate)
        if stop == layout.num_tokens and start <= tail < stop and rows:
            yield Rows(place + tail - start, offset, rows, rate)
        place += stop - start


def _split_segments(
    branch: Branch, layout: TokenLayout, rank: int, heads: HeadSet
) -> Iterator[dict[int, list[_Piece]]]:
    """The segments of which a rank has rows and others, or another range of its own, have some, too."""
    length = branch.segment_length
    numbers: set[int] = set()
    for start, stop in layout.ranges(rank):
        for token in (start, stop - 1):
            segment = token // length
            begin, end = segment * length, min((segment + 1) * length, layout.num_tokens)
            if begin < start or end > stop:
                numbers.add(segment)
    for segment in sorted(numbers):
        by_rank: dict[int, list[_Piece]] = {}
        for piece in _pieces(branch, layout, segment, heads.offset):
            by_rank.setdefault(piece.rank, []).append(piece)
        if rank in by_rank:
            yield by_rank


def _pieces(branch: Branch, layout: TokenLayout, segment: int, offset: int) -> Iterator[_Piece]:
    """The rows of a segment, range by range in the order of tokens."""
    length, rate = branch.segment_length, branch.rate
    begin, end = segment * length, min((segment + 1) * length, layout.num_tokens)
    found = []
    for rank in range(layout.num_ranks):
        place = 0
        for start, stop in layout.ranges(rank):
            skipped = num_rows(start - begin, offset, rate)
            first = begin + offset + skipped * rate
            if (count := num_rows(min(stop, end), first, rate)) and first < end and stop > begin:
                found.append(_Piece(rank, start, Rows(place + first - start, 0, count, rate)))
            place += stop - start
    yield from sorted(found, key=lambda piece: piece.order)


def _own_calls(heads: HeadSet, pieces: Sequence[_Piece], causal: bool) -> Iterator[Call]:
    """A split segment's rows of this rank with each other."""
    rows = tuple(piece.rows for piece in pieces)
    if not causal:
        yield Call(heads, _joined(rows), _joined(rows), causal=False)
        return
    for number, key in enumerate(rows):
        yield Call(heads, (key,), (key,), causal=True)
        if later := _joined(rows[number + 1 :]):
            yield Call(heads, later, (key,), causal=False)


def _step(
    split: Sequence[tuple[HeadSet, Mapping[int, Sequence[_Piece]]]],
    layout: TokenLayout,
    rank: int,
    distance: int,
    causal: bool,
) -> Step:
    to_rank, from_rank = (rank + distance) % layout.num_ranks, (rank - distance) % layout.num_ranks
    sent: list[Entry] = []
    received: list[Entry] = []
    calls: list[Call] = []
    for heads, pieces in split:
        sent += [Entry(heads, key.rows) for key, _ in _read(pieces, rank, to_rank, causal)]
        entries_of: dict[tuple[Rows, ...], list[int]] = {}
        for key, queries in _read(pieces, from_rank, rank, causal):
            entries_of.setdefault(queries, []).append(len(received))
            received.append(Entry(heads, key.rows))
        calls += [
            Call(heads, queries, (), causal=False, entries=tuple(entries))
            for queries, entries in entries_of.items()
        ]
    return Step(to_rank, from_rank, tuple(sent), tuple(received), tuple(calls))


def _read(
    pieces: Mapping[int, Sequence[_Piece]], owner: int, reader: int, causal: bool
) -> Iterator[tuple[_Piece, tuple[Rows, ...]]]:
    """The owner's pieces that the reader needs, each with the reader's rows that read it."""
    for key in pieces.get(owner, ()):
        queries = [query.rows for query in pieces.get(reader, ()) if not causal or query.order > key.order]
        if queries:
            yield key, _joined(queries)


def _joined(parts: Sequence[Rows]) -> tuple[Rows, ...]:
    """The same rows in fewer parts: both halves of a zigzag rank lie in one piece, and need no copy."""
    found: list[Rows] = []
    for part in parts:
        before = found[-1] if found else replace(part, count=0)
        follows = before.base + before.offset + before.count * before.rate == part.base + part.offset
        if found and follows and part.rate == before.rate:
            found[-1] = replace(before, count=before.count + part.count)
        else:
            found.append(part)
    return tuple(found)
