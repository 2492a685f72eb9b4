"""A share whose messages are cut into blocks, so that what is under way does not grow with the sequence.

Sender and receiver cut the same entries in the same way, so that again nothing has to be agreed on. All
ranks make as many steps, of which some are empty: NCCL wants messages in one order everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megaplug.layers.attention.calls import Call
from megaplug.layers.attention.pattern import Branch, Heads, head_sets
from megaplug.layers.attention.share import Entry, Share, Step, share_of_rank
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
    most_weighed: int = 0,
) -> Share:
    """As ``share_of_rank``; no message holds more than the keys and values of ``block_size`` tokens.

    A message that would is sent as several, each computed with while the next is under way. None leaves all
    messages whole.
    """
    share = share_of_rank(pattern, layout, rank, heads, rule, causal, most_weighed)
    if block_size is None:
        return share
    room = block_size * heads.num_groups
    count = _most_blocks(pattern, layout, heads, rule, room)
    steps = tuple(part for step in share.steps for part in _parts_of_step(step, room, count))
    return replace(share, steps=steps)


def _most_blocks(pattern: tuple[Branch, ...], layout: TokenLayout, heads: Heads, rule: str, room: int) -> int:
    """No message of any rank makes more.

    A rank has no more than its share of a branch's rows and one for each end of its ranges; a block is left
    when not even one row of all groups has room.
    """
    tokens = layout.num_tokens // layout.num_ranks
    rows = sum(
        (tokens // branch.rate + 4) * head_set.groups.count
        for branch in pattern
        for head_set in head_sets(heads, rule, branch.rate)
    )
    return -(-rows // (room - heads.num_groups + 1))


def _parts_of_step(step: Step, room: int, count: int) -> Iterator[Step]:
    """So many steps, in order."""
    call_of = {entry: call for call in step.calls for entry in call.entries}
    all_sent, all_received = (_blocks(entries, room, count) for entries in (step.sent, step.received))
    for sent, received in zip(all_sent, all_received, strict=True):
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


def _blocks(entries: Sequence[Entry], room: int, count: int) -> list[list[tuple[int, Entry]]]:
    """Entries, or parts of them, with their numbers; of at most ``room`` rows of one group a block.

    Blocks beyond the last are empty, so that there are ``count``.
    """
    blocks: list[list[tuple[int, Entry]]] = []
    left = 0
    for number, entry in enumerate(entries):
        rows, groups, first = entry.rows, entry.heads.groups.count, 0
        while first < rows.count:
            if left < groups:
                blocks.append([])
                left = room
            taken = min(rows.count - first, left // groups)
            part = replace(rows, base=rows.base + first * rows.rate, count=taken)
            blocks[-1].append((number, Entry(entry.heads, part)))
            first += taken
            left -= taken * groups
    assert len(blocks) <= count, "a rank has more rows than it can have"
    return blocks + [[] for _ in range(count - len(blocks))]
