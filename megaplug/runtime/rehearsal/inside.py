"""Memory inside of CUDA's kernels, which no operator gives back: torch's ``meta`` device has none of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_ATTENTION_BACKWARD = (torch.ops.aten._scaled_dot_product_flash_attention_backward, _EFFICIENT_BACKWARD)


def made_inside(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """What CUDA's kernel of an operator allocates for itself, and lets go of when the operator is done.

    Of flash attention's backward pass (``mha_bwd`` in torch's ``flash_api.cpp``) these are sums of the
    gradients of queries and of each row, both in fp32, and where groups of heads share keys the gradients of
    keys and values of every head. Of the efficient kernel's (``kernel_backward.h``) the same sums, in blocks
    of 64 rows and channels.
    """
    if func.overloadpacket not in _ATTENTION_BACKWARD:
        return []
    query, key = args[1], args[2]
    batch, heads, length, size = query.shape
    if func.overloadpacket is _EFFICIENT_BACKWARD:
        rows, channels = _rounded(length, 64), _rounded(size, 64)
    else:
        rows, channels = _rounded(length, 128), _rounded(size, 32 if size <= 128 else 64)
    made = [
        query.new_empty((batch, rows, heads, channels), dtype=torch.float32),
        query.new_empty((batch, heads, rows), dtype=torch.float32),
    ]
    if key.shape[1] != heads:
        made += [key.new_empty((batch, key.shape[2], heads, size)) for _ in range(2)]
    return made


def _rounded(number: int, of: int) -> int:
    return -(-number // of) * of
