"""What dilated attention costs and reaches: every number counted from the pattern, none measured.

Conventions: a multiply-add is two operations; only pairs of a query and a key that are computed count.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaplug.errors import UserError
from megaplug.layers.attention.given import one_of, whole
from megaplug.layers.attention.pattern import (
    OFFSETS,
    Branch,
    Heads,
    branches,
    coverage,
    head_sets,
    num_rows,
    pairs_of_branch,
)
from megaplug.layers.attention.token_layout import TokenLayout


@dataclass(frozen=True)
class Sizes:
    """Of one attention layer: sequences, tokens of the whole sequence, heads and bytes of an element.

    Raises:
        UserError: One is no integer of at least 1, or the key-value heads do not divide the heads.
    """

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_size: int = 2
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, whole(name, value))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_kv_heads} key-value heads cannot be shared by {self.num_heads} heads",
                hint="the number of key-value heads divides that of query heads",
            )


def describe(
    sizes: Sizes,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    num_ranks: int = 1,
    layout: str = "contiguous",
    offset: str = "kv_group",
    causal: bool = True,
) -> dict[str, Any]:
    """What one layer costs each rank, and how far a token sees in it.

    Args:
        sizes: Of the layer.
        segment_lengths: In tokens.
        dilation_rates: As many.
        num_ranks: That share the sequence.
        layout: How its tokens are spread.
        offset: How heads get their rows.
        causal: Whether a token sees only those before it and itself.

    Returns:
        ``forward_flops`` of all ranks together and ``dense_over_dilated``, how many times as many dense
        attention has; ``saved_bytes`` for the backward pass and ``received_bytes`` of keys and values in a
        forward pass, by rank: the ``mean`` and the ``largest`` (as many come again in a backward pass, and
        gradients of what was sent come back, in fp32 from kernels that give them so, else alike);
        ``receptive_field``, the tokens of the longest segment, which is as far as any number of layers sees
        where all segments' borders coincide; ``coverage``, for each branch the share of tokens that any head
        reads; ``branches_without_communication``. All derived.

    Raises:
        UserError: The pattern, the layout or the offset cannot be.
    """
    if not isinstance(sizes, Sizes):
        raise UserError(
            f"the sizes of a layer are {sizes!r}",
            hint="give Sizes(num_tokens, num_heads, num_kv_heads, head_dim)",
        )
    pattern = branches(segment_lengths, dilation_rates)
    num_ranks = whole("num_ranks", num_ranks)
    one_of("offset", offset, OFFSETS)
    heads = Heads(sizes.num_heads, sizes.num_kv_heads)
    tokens = TokenLayout(layout, sizes.num_tokens, num_ranks)
    pairs = sum(
        pairs_of_branch(sizes.num_tokens, branch, head_offset, causal=causal)
        for branch in pattern
        for head_offset in heads.offsets(offset, branch.rate)
    )
    dense = sizes.num_heads * (
        sizes.num_tokens * (sizes.num_tokens + 1) // 2 if causal else sizes.num_tokens**2
    )
    # [branch][rank]
    received = [
        [
            rows_awaited(branch, heads, tokens, rank, rule=offset, causal=causal) * 2 * sizes.head_dim
            for rank in range(num_ranks)
        ]
        for branch in pattern
    ]
    by_rank = [sum(each) for each in zip(*received, strict=True)]
    bytes_of_element = sizes.batch_size * sizes.element_size
    token_bytes = (2 * sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim * bytes_of_element
    lse_bytes = (8 if sizes.element_size == 8 else 4) * sizes.num_heads * sizes.batch_size
    return {
        "forward_flops": 4 * sizes.head_dim * sizes.batch_size * pairs,
        "dense_over_dilated": dense / pairs if pairs else float("inf"),
        "saved_bytes": (token_bytes + lse_bytes) * (sizes.num_tokens // num_ranks),
        "received_bytes": {
            "mean": bytes_of_element * sum(by_rank) / num_ranks,
            "largest": bytes_of_element * max(by_rank),
        },
        "receptive_field": min(sizes.num_tokens, max(branch.segment_length for branch in pattern)),
        "coverage": [coverage(heads, offset, branch.rate) for branch in pattern],
        "branches_without_communication": [
            branch.segment_length
            for branch, elements in zip(pattern, received, strict=True)
            if not any(elements)
        ],
    }


def rows_awaited(
    branch: Branch, heads: Heads, layout: TokenLayout, rank: int, *, rule: str, causal: bool
) -> int:
    """The formula of what is sent: rows of other ranks that any query of this rank reads in a branch.

    Of each segment that a rank shares with others those before its own last part; all of them without a
    causal mask. A row counts once for each key-value head and each of the offsets that its query heads have.
    """
    length, rate, total = branch.segment_length, branch.rate, 0
    ranges = layout.ranges(rank)
    for segment in {token // length for start, stop in ranges for token in (start, stop - 1)}:
        begin, end = segment * length, min((segment + 1) * length, layout.num_tokens)
        parts = [
            (max(start, begin), min(stop, end)) for start, stop in ranges if start < end and stop > begin
        ]
        if parts == [(begin, end)]:
            continue
        for offset, groups in _groups_by_offset(heads, rule, rate):

            def before(token: int, begin: int = begin, offset: int = offset) -> int:
                return num_rows(token - begin, offset, rate)

            mine = [(start, before(stop) - before(start)) for start, stop in parts]
            if with_queries := [start for start, rows in mine if rows]:
                last = with_queries[-1] if causal else end
                own = sum(rows for start, rows in mine if start < last)
                total += (before(last) - own) * groups
    return total


@functools.lru_cache(maxsize=64)
def _groups_by_offset(heads: Heads, rule: str, rate: int) -> tuple[tuple[int, int], ...]:
    """Offsets, each with how many key-value heads have it for some of their query heads."""
    return tuple((each.offset, each.groups.count) for each in head_sets(heads, rule, rate))
