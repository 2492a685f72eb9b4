"""torch's flash attention on a CPU, for blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from megaplug.layers.attention.kernels.interface import Block, by_head

_aten = torch.ops.aten
# Keys times elements of a head, up to which the kernel is faster in fp32 (measured for flash.py).
_SHORT = 512 * 32
# 4 MiB of fp32: what the C library gives back and takes again without the pages being cleared anew, and what
# is still in the cache when the results are added up.
_ELEMENTS = 1 << 20
# Bytes: rows that are as far apart, or further, cost the kernel a miss of the table of pages each.
_PAGE = 4096


class CpuFlash:
    """fp64, fp32, bf16 and fp16, groups, any strides."""

    name = "torch's cpu flash_attention"
    most_elements: int | None = _ELEMENTS
    wide_gradients = True

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``; the output is fp32 where that was computed with."""
        q, k, v = _taken(block, block.q, block.k, block.v)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, block.causal, scale=block.scale
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``; the gradients are fp32 where that was computed with."""
        tensors = _taken(block, d_out, block.q, block.k, block.v, out)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse.transpose(1, 2), 0.0, block.causal, scale=block.scale
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
    return k.size(1) * k.size(3) <= _SHORT or not torch.cpu._is_amx_tile_supported()
