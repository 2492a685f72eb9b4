"""torch's own fused attention kernels on CUDA, for blocks.

Written from torch's sources (aten/src/ATen/native/transformers/cuda); no GPU has run them yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaplug.layers.attention.kernels.interface import Block, BlockKernel, by_head

_aten = torch.ops.aten


class CudaFlash(BlockKernel):
    """torch's FlashAttention-2: bf16 and fp16, groups, from Ampere on."""

    name = "torch's cuda flash_attention"

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        found = _aten._scaled_dot_product_flash_attention(
            *by_head(block.q, block.k, block.v), 0.0, block.causal, scale=block.scale
        )
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        state = torch.zeros(2, dtype=torch.uint64, device=lse.device)  # of dropout, which there is none of
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *by_head(d_out, block.q, block.k, block.v, out), lse.transpose(1, 2).contiguous(), None, None,
            block.q.size(1), block.k.size(1), 0.0, block.causal, state, state[:0], scale=block.scale,
        )  # fmt: skip
        return by_head(*grads)


class CudaCudnn(BlockKernel):
    """cuDNN's: bf16 and fp16, groups; the fastest in torch's wheels from Hopper on."""

    name = "torch's cudnn_attention"

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        found = _aten._scaled_dot_product_cudnn_attention(
            *by_head(block.q, block.k, block.v), None, True, 0.0, block.causal, scale=block.scale
        )
        lse = found[1].flatten(2)  # its last dimension is one
        return found[0].transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        state = torch.zeros((), dtype=torch.int64, device=lse.device)
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            *by_head(d_out, block.q, block.k, block.v, out), lse.transpose(1, 2).contiguous()[..., None],
            state, state, None, None, None, block.q.size(1), block.k.size(1), 0.0, block.causal,
            scale=block.scale,
        )  # fmt: skip
        return by_head(*grads)


class CudaEfficient(BlockKernel):
    """The memory-efficient kernel, the only fused one with fp32; K and V are repeated."""

    name = "torch's efficient_attention"

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            *by_head(block.q, *_repeated(block)), None, True, 0.0, block.causal, scale=block.scale
        )
        # It rounds the number of rows up.
        return out.transpose(1, 2), lse[..., : block.q.size(1)].transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        state = torch.zeros((), dtype=torch.int64, device=lse.device)
        num_rows = block.q.size(1)
        padded = lse.new_full((lse.size(0), lse.size(2), -(-num_rows // 32) * 32), torch.inf)
        padded[..., :num_rows] = lse.transpose(1, 2)
        d_q, d_k, d_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
            *by_head(d_out, block.q, *_repeated(block)), None, out.transpose(1, 2), padded, state, state, 0.0,
            [True, True, True, False], block.causal, scale=block.scale,
        )  # fmt: skip
        d_k, d_v = (x.unflatten(1, (block.k.size(2), -1)).sum(2) for x in (d_k, d_v))
        return by_head(d_q, d_k, d_v)


def _repeated(block: Block) -> tuple[Tensor, Tensor]:
    times = block.q.size(2) // block.k.size(2)
    return block.k.repeat_interleave(times, 2), block.v.repeat_interleave(times, 2)
