"""torch's flash attention on a CPU, for blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from megaplug.layers.attention.kernels.interface import Block, BlockKernel, by_head
from megaplug.layers.attention.kernels.weighing import apart, mask_of, together

_aten = torch.ops.aten
# Keys times elements of a head, up to which the kernel is faster in fp32 (measured for flash.py).
_SHORT = 512 * 32
# 4 MiB of fp32: what the C library gives back and takes again without the pages being cleared anew, and what
# is still in the cache when the results are added up.
_ELEMENTS = 1 << 20
# Pairs: of a mask that all heads share, 64 MiB in fp32.
_MASK = 1 << 24
# Bytes: rows that are as far apart, or further, cost the kernel a miss of the table of pages each.
_PAGE = 4096


class CpuFlash(BlockKernel):
    """fp64, fp32, bf16 and fp16, groups, any strides."""

    name = "torch's cpu flash_attention"
    most_elements = _ELEMENTS
    wide_gradients = True

    def most_weighed(self, dtype: torch.dtype) -> int:
        """As ``BlockKernel``; what weighs bf16 where there is AMX has not been measured."""
        return _MASK if dtype in (torch.float32, torch.float64) or _narrow_is_fp32() else 0

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``; the output is fp32 where that was computed with."""
        mask = mask_of(block)
        out, lse = zip(*(_forward(part, mask) for part in apart(block)), strict=True)
        return together(out), together(lse)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``; the gradients are fp32 where that was computed with."""
        mask, parts = mask_of(block), apart(block)
        n = len(parts)
        found = (
            _backward(part, mask, *(x[:, :, i::n] for x in (d_out, out, lse))) for i, part in enumerate(parts)
        )
        d_q, d_k, d_v = zip(*found, strict=True)
        return together(d_q), sum(d_k[1:], d_k[0]), sum(d_v[1:], d_v[0])


def _forward(block: Block, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *_taken(block, block.q, block.k, block.v), 0.0, block.causal, attn_mask=mask, scale=block.scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward(
    block: Block, mask: Tensor | None, d_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _taken(block, d_out, block.q, block.k, block.v, out)
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse.transpose(1, 2), 0.0, block.causal, attn_mask=mask, scale=block.scale
    )
    return by_head(*grads)


def _taken(block: Block, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as the kernel is fastest with: heads before rows, near each other, perhaps in fp32."""
    dtype = torch.float32 if _is_faster_in_fp32(block.k) else block.k.dtype
    return tuple(_near(x.to(dtype)) for x in by_head(*tensors))


def _near(x: Tensor) -> Tensor:
    return x.contiguous() if x.stride(2) * x.element_size() >= _PAGE else x


def _is_faster_in_fp32(k: Tensor) -> bool:
    """Short blocks are, and all of them where there is no AMX; it is no less exact, since out stays fp32.

    Forward and backward of 2,048 rows of 64 elements on a Xeon with AVX-512 BF16 and no AMX: bf16 takes 1.65x
    as long as fp32, conversions included.
    """
    if k.dtype not in (torch.bfloat16, torch.float16):
        return False
    return k.size(1) * k.size(3) <= _SHORT or _narrow_is_fp32()


def _narrow_is_fp32() -> bool:
    """Whether bf16 and fp16 are computed in fp32, however long the block."""
    return not torch.cpu._is_amx_tile_supported()
