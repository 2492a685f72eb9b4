"""What a person may not have meant by a dilated pattern that is no mistake; without torch.

A branch is a segment's length w and a rate r: of each segment a head of offset s reads the rows s, s + r, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megaplug.layers.registry.sequence_cost import SequenceSizes, head_offsets

# Rows that are looked at, of longer sequences the first: enough for whole percents.
_ROWS = 1 << 20


def reach(num_tokens: int, params: Mapping[str, Any]) -> int:
    """How many tokens the longest segment has: as far as a layer reads, the token itself included."""
    return min(num_tokens, max(params.get("segment_lengths") or (num_tokens,)))


def pattern_notes(sizes: SequenceSizes, params: Mapping[str, Any], key: str) -> Iterator[str]:
    """A line for rows that no branch has, and for each branch of single rows.

    Args:
        sizes: Of the layer.
        params: The user's, which nothing is wrong with.
        key: Under which they stand.
    """
    lengths, rates = params.get("segment_lengths") or (), params.get("dilation_rates") or ()
    branches = [(min(length, sizes.num_tokens), rate) for length, rate in zip(lengths, rates, strict=True)]
    for length, rate in branches:
        if rate >= length > 1:
            yield (
                f"{key}: of each segment of {length:,} tokens rate {rate:,} takes one row at most, "
                "which reads itself only"
            )
    if branches and 1 not in rates:
        share = _unread(sizes, branches, params.get("offset", "kv_group"))
        if share > 0:
            percent = "less than 1%" if share < 0.01 else f"{share:.0%}"
            told = f"{percent} of the heads' rows are in no branch, and give zeros"
            yield f"{key}.dilation_rates has no 1: {told}"


def _unread(sizes: SequenceSizes, branches: list[tuple[int, int]], rule: str) -> float:
    """Which part of all heads' rows no branch has."""
    num_rows = min(sizes.num_tokens, _ROWS)
    offsets = [head_offsets(sizes, rule, rate) for _, rate in branches]
    of_heads = list(zip(*offsets, strict=True))
    missing = 0
    for of_head in set(of_heads):
        rows = 0  # a byte each
        for (length, rate), offset in zip(branches, of_head, strict=True):
            segment = bytearray(min(length, num_rows))
            segment[offset::rate] = b"\1" * len(range(offset, len(segment), rate))
            rows |= int.from_bytes((segment * -(-num_rows // len(segment)))[:num_rows])
        missing += of_heads.count(of_head) * (num_rows - rows.bit_count())
    return missing / (num_rows * len(of_heads))
