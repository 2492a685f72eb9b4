"""One call of a kernel as integers: which heads, which rows, and how often a pair of rows counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megaplug.layers.attention.pattern import HeadSet


@dataclass(frozen=True)
class Rows:
    """Places ``base + n length + offset + l rate`` of a rank: ``count`` rows in each of n segments."""

    base: int
    offset: int
    count: int
    rate: int
    segments: int = 1
    length: int = 0


@dataclass(frozen=True)
class Repeats:
    """How often pairs of a call count: once, and once more for each later branch that has both rows.

    Those branches lie in one another, so as many have a pair as have that of its rows which fewer have.

    Attributes:
        of_rows: How many later branches have a row, for rows 0, 1, ... of the call's sequences and its first
            key-value group; after the last from the first on again.
        shift: Row l of group n is as row ``l + n shift`` of the first.
    """

    of_rows: tuple[int, ...]
    shift: int


@dataclass(frozen=True)
class Call:
    """One call of a kernel: query rows one after another against key rows one after another.

    Attributes:
        heads: The heads that are computed.
        queries: Rows of this rank.
        keys: Rows of this rank; in a step, numbers of entries of the message instead.
        causal: Whether it is a square on the diagonal; else every query reads every key.
        entries: In a step, of the message.
        repeats: How often a pair counts; None for once.
    """

    heads: HeadSet
    queries: tuple[Rows, ...]
    keys: tuple[Rows, ...]
    causal: bool
    entries: tuple[int, ...] = ()
    repeats: Repeats | None = None


def split_call(call: Call, most_segments: int) -> Iterator[Call]:
    """A call on a rank's own rows as calls of at most so many segments each."""
    total = call.queries[0].segments
    if len(call.queries) > 1 or total <= most_segments:
        yield call
        return
    for first in range(0, total, most_segments):
        count = min(most_segments, total - first)
        queries, keys = (
            tuple(replace(rows, base=rows.base + first * rows.length, segments=count) for rows in parts)
            for parts in (call.queries, call.keys)
        )
        yield replace(call, queries=queries, keys=keys)
