"""Pairs that count M times as a mask of ``log M``, which is added to scores.

All heads share one mask. What it holds comes back after so many rows and columns, and the rows of a group are
those of the group before, moved: so the mask of each group is a square of one larger square, a bit further
along its diagonal, and no more memory is needed than for one of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megaplug.layers.attention.calls import Repeats
from megaplug.layers.attention.kernels.interface import Block


def mask_of(block: Block) -> Tensor | None:
    """``[1, G, S, T]``, a view in which memory is shared, or ``[1, 1, S, T]``; None where pairs count once.

    At least fp32, in which kernels have scores.
    """
    repeats = block.repeats
    if repeats is None:
        return None
    num_masks = block.k.size(2) if repeats.shift else 1
    num_rows, num_keys = block.q.size(1), block.k.size(1)
    further = (num_masks - 1) * repeats.shift
    dtype = torch.promote_types(block.q.dtype, torch.float32)
    weights = torch.tensor(repeats.of_rows, dtype=dtype, device=block.q.device).log1p()
    of_rows, of_keys = (
        weights[torch.arange(count + further, device=weights.device) % len(weights)]
        for count in (num_rows, num_keys)
    )
    whole = torch.minimum(of_rows[:, None], of_keys[None, :])
    row = whole.stride(0)
    return whole.as_strided((1, num_masks, num_rows, num_keys), (0, repeats.shift * (row + 1), row, 1))


def apart(block: Block) -> list[Block]:
    """The block, or blocks with a head of each group where a group's mask would be for several heads."""
    per_group = block.q.size(2) // block.k.size(2)
    if block.repeats is None or not block.repeats.shift or per_group == 1:
        return [block]
    return [replace(block, q=block.q[:, :, head::per_group]) for head in range(per_group)]


def together(parts: tuple[Tensor, ...]) -> Tensor:
    """``[B, S, H, ...]`` of what such blocks gave."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, 3).flatten(2, 3)


def repeats_of_rows(repeats: Repeats, x: Tensor, num_groups: int) -> Tensor:
    """``[G, S]`` for ``[B, S, ...]``: how many later branches have a row."""
    rows = torch.arange(x.size(1)) + torch.arange(num_groups)[:, None] * repeats.shift
    return torch.tensor(repeats.of_rows)[rows % len(repeats.of_rows)].to(x.device)
