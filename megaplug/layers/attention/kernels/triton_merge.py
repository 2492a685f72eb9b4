"""Merging a block into what is there in one pass over both, in Triton.

torch's way reads and writes rows several times: once to widen them, once to mix. Here every row is read
once and written once, wherever it lies. No GPU has timed it yet, so ``merge=torch`` is the default.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megaplug.layers.attention.rows import shares_of

_ROWS = 32


@triton.jit
def _place(
    strides: tl.tuple, b: tl.tensor, s: tl.tensor, r: tl.tensor, g: tl.tensor, h: tl.tensor
) -> tl.tensor:
    return b * strides[0] + s * strides[1] + r * strides[2] + g * strides[3] + h * strides[4]


@triton.jit
def _merge_rows(
    total: tl.tensor,
    total_lse: tl.tensor,
    new: tl.tensor,
    new_lse: tl.tensor,
    sizes: tl.tuple,
    total_strides: tl.tuple,
    total_lse_strides: tl.tuple,
    new_strides: tl.tuple,
    new_lse_strides: tl.tuple,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """One head of one segment of one sequence, by so many rows; sizes and strides as of ``rows.merge``."""
    _, segments, count, groups, heads, head_dim = sizes
    program = tl.program_id(0).to(tl.int64)
    h = program % heads
    g = program // heads % groups
    s = program // (heads * groups) % segments
    b = program // (heads * groups * segments)
    r = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = r < count
    lse_at = total_lse + _place(total_lse_strides, b, s, r, g, h)
    before = tl.load(lse_at, mask=is_row, other=0.0)
    found = tl.load(new_lse + _place(new_lse_strides, b, s, r, g, h), mask=is_row, other=0.0)
    more = found - before  # infinite where nothing was before
    weight = 1.0 / (1.0 + tl.exp(-more))
    tl.store(lse_at, tl.maximum(before, found) + tl.log(1.0 + tl.exp(-tl.abs(more))), mask=is_row)
    d = tl.arange(0, DIM)
    is_there = is_row[:, None] & (d < head_dim)[None, :]
    out_at = total + _place(total_strides, b, s, r, g, h)[:, None] + d[None, :]
    new_at = new + _place(new_strides, b, s, r, g, h)[:, None] + d[None, :]
    old = tl.load(out_at, mask=is_there, other=0.0)
    rows = tl.load(new_at, mask=is_there, other=0.0).to(old.dtype)
    tl.store(out_at, old + (rows - old) * weight[:, None], mask=is_there)


def merge_fused(places: list[Tensor], lse_places: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """As ``rows.merge``."""
    outs, lses = shares_of(out, places), shares_of(lse, lse_places)
    for place, lse_place, o, new in zip(places, lse_places, outs, lses, strict=True):
        batch, segments, count, groups, heads, dim = place.shape
        grid = (batch * segments * groups * heads, triton.cdiv(count, _ROWS))
        strides = (x.stride()[:5] for x in (place, lse_place, o, new))
        _merge_rows[grid](
            place, lse_place, o, new, tuple(place.shape), *strides,
            ROWS=_ROWS, DIM=triton.next_power_of_2(dim),
        )  # fmt: skip
