"""A share whose messages are cut into blocks, so that what is under way does not grow with the sequence.

Sender and receiver cut the same entries in the same way, so that again nothing has to be agreed on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

from megaplug.layers.attention.pattern import Branch, Heads
from megaplug.layers.attention.share import Call, Entry, Share, Step, share_of_rank
from megaplug.layers.attention.token_layout import TokenLayout


@functools.lru_cache(maxsize=64)
def share_in_blocks(
    pattern: tuple[Branch, ...],
    layout: TokenLayout,
    rank: int,
    heads: Heads,
    rule: str,
    causal: bool,
    block_size: int | None,
) -> Share:
    """As ``share_of_rank``; no message holds more than the keys and values of ``block_size`` tokens.

    A message that would is sent as several, each computed with while the next is under way. None leaves all
    messages whole.
    """
    share = share_of_rank(pattern, layout, rank, heads, rule, causal)
    if block_size is None:
        return share
    room = block_size * heads.num_groups
    steps = tuple(part for step in share.steps for part in _parts_of_step(step, room))
    return replace(share, steps=steps)


def _parts_of_step(step: Step, room: int) -> Iterator[Step]:
    """Step by step, as many as the longer of the two messages makes."""
    call_of = {entry: call for call in step.calls for entry in call.entries}
    nothing: list[tuple[int, Entry]] = []
    blocks = zip_longest(_blocks(step.sent, room), _blocks(step.received, room), fillvalue=nothing)
    for sent, received in blocks:
        entries_of: dict[Call, list[int]] = {}
        for place, (number, _) in enumerate(received):
            entries_of.setdefault(call_of[number], []).append(place)
        calls = tuple(replace(call, entries=tuple(places)) for call, places in entries_of.items())
        yield replace(
            step,
            sent=tuple(entry for _, entry in sent),
            received=tuple(entry for _, entry in received),
            calls=calls,
        )


def _blocks(entries: Sequence[Entry], room: int) -> list[list[tuple[int, Entry]]]:
    """Entries, or parts of them, with their numbers; of at most ``room`` rows of one group a block."""
    blocks: list[list[tuple[int, Entry]]] = []
    left = 0
    for number, entry in enumerate(entries):
        rows, groups, first = entry.rows, entry.heads.groups.count, 0
        while first < rows.count:
            if left < groups:
                blocks.append([])
                left = room
            count = min(rows.count - first, left // groups)
            part = replace(rows, base=rows.base + first * rows.rate, count=count)
            blocks[-1].append((number, Entry(entry.heads, part)))
            first += count
            left -= count * groups
    return blocks
