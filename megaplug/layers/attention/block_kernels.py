"""Attention of one block of rows, with the log-sum-exp of its scores, behind one interface.

Shape letters: B sequences, S queries, T keys, H query heads, G key-value heads, D elements a head.

The backward pass takes the output and log-sum-exp of the *whole* softmax that the block is a part of. Of
score s of query i: ``p = exp(s - lse_i)``, ``ds = p (do_i v^T - do_i . out_i)``; both are right for a part
as they stand, so the kernels that torch has need no change.

Causal blocks are squares here (S = T), so that it never matters from which corner a kernel's triangle
starts; and no block is empty: torch's CPU kernel divides by its number of keys.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megaplug.errors import UserError

_aten = torch.ops.aten
# Keys times elements of a head, up to which torch's CPU kernel is faster in fp32 (measured for flash.py).
_SHORT_ON_CPU = 512 * 32


class BlockKernel(Protocol):
    """A kernel. ``[B, S, H, D]`` queries, ``[B, T, G, D]`` keys and values; H a multiple of G.

    Attributes:
        name: For people.
        wide_gradients: Whether gradients of bf16 and fp16 may come in fp32, which other ranks should then
            get.
    """

    name: str
    wide_gradients: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """The output ``[B, S, H, D]`` and the natural log-sum-exp ``[B, S, H]``, fp32 or fp64."""
        ...

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, given the output and log-sum-exp of the whole softmax."""
        ...


class Reference:
    """Written out, every score in memory: for fp64, to compare with, and where there is no other."""

    name = "reference"
    wide_gradients = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        scores = self._scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        out = torch.einsum("bgnst,btgd->bsgnd", (scores - lse[..., None]).exp(), v.to(scores.dtype))
        return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2).transpose(1, 2)

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        scores = self._scores(q, k, causal, scale)
        split = (k.size(2), -1)
        q_wide, d_wide, out_wide = (x.to(scores.dtype).unflatten(2, split) for x in (q, d_out, out))
        k_wide, v_wide = k.to(scores.dtype), v.to(scores.dtype)
        p = (scores - lse.transpose(1, 2).unflatten(1, split)[..., None]).exp()
        d_v = torch.einsum("bgnst,bsgnd->btgd", p, d_wide)
        delta = (d_wide * out_wide).sum(-1).permute(0, 2, 3, 1)
        d_scores = p * (torch.einsum("bsgnd,btgd->bgnst", d_wide, v_wide) - delta[..., None]) * scale
        d_q = torch.einsum("bgnst,btgd->bsgnd", d_scores, k_wide).flatten(2, 3)
        d_k = torch.einsum("bgnst,bsgnd->btgd", d_scores, q_wide)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        grouped = q.to(wide).unflatten(2, (k.size(2), -1))
        scores = torch.einsum("bsgnd,btgd->bgnst", grouped, k.to(wide)) * scale
        if causal:
            size = (q.size(1), k.size(1))
            scores.masked_fill_(torch.ones(size, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        return scores


class CpuFlash:
    """torch's flash attention on a CPU: fp64, fp32, bf16 and fp16, groups, any strides."""

    name = "torch's cpu flash_attention"
    wide_gradients = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        if _is_faster_in_fp32(k):
            out, lse = self.forward(q.float(), k.float(), v.float(), causal, scale)
            return out, lse
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *_by_head(q, k, v), 0.0, causal, scale=scale
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        if _is_faster_in_fp32(k):
            d_out, q, k, v, out = (x.float() for x in (d_out, q, k, v, out))
            return self.backward(d_out, q, k, v, out, lse, causal, scale)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_by_head(d_out, q, k, v, out, lse), 0.0, causal, scale=scale
        )
        return _by_head(*grads)


class CudaFlash:
    """torch's FlashAttention-2 on CUDA: bf16 and fp16, groups, from Ampere on."""

    name = "torch's cuda flash_attention"
    wide_gradients = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        found = _aten._scaled_dot_product_flash_attention(*_by_head(q, k, v), 0.0, causal, scale=scale)
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
        lse = lse.transpose(1, 2).contiguous()
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *_by_head(d_out, q, k, v, out), lse, None, None, q.size(1), k.size(1), 0.0, causal, state,
            state[:0], scale=scale,
        )  # fmt: skip
        return _by_head(*grads)


class CudaCudnn:
    """cuDNN's on CUDA: bf16 and fp16, groups; the fastest in torch's wheels from Hopper on."""

    name = "torch's cudnn_attention"
    wide_gradients = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        found = _aten._scaled_dot_product_cudnn_attention(
            *_by_head(q, k, v), None, True, 0.0, causal, scale=scale
        )
        lse = found[1].flatten(2)  # some versions give it a last dimension of one
        return found[0].transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        lse = lse.transpose(1, 2).contiguous()[..., None]
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            *_by_head(d_out, q, k, v, out), lse, state, state, None, None, None, q.size(1), k.size(1), 0.0,
            causal, scale=scale,
        )  # fmt: skip
        return _by_head(*grads)


class CudaEfficient:
    """The memory-efficient kernel on CUDA, the only fused one with fp32; K and V are repeated."""

    name = "torch's efficient_attention"
    wide_gradients = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
        found = _aten._scaled_dot_product_efficient_attention(
            *_by_head(q, k, v), None, True, 0.0, causal, scale=scale
        )
        # It rounds the number of rows up.
        return found[0].transpose(1, 2), found[1][..., : q.size(1)].transpose(1, 2)

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        num_groups = k.size(2)
        k, v = (x.repeat_interleave(q.size(2) // num_groups, 2) for x in (k, v))
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        rows = -(-q.size(1) // 32) * 32
        padded = lse.new_full((lse.size(0), lse.size(2), rows), torch.inf)
        padded[..., : q.size(1)] = lse.transpose(1, 2)
        d_q, d_k, d_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
            *_by_head(d_out, q, k, v), None, out.transpose(1, 2), padded, state, state, 0.0,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        d_k, d_v = (x.unflatten(1, (num_groups, -1)).sum(2) for x in (d_k, d_v))
        return _by_head(d_q, d_k, d_v)


KERNELS: dict[str, BlockKernel] = {
    "reference": Reference(),
    "cpu_flash": CpuFlash(),
    "cuda_flash": CudaFlash(),
    "cudnn": CudaCudnn(),
    "efficient": CudaEfficient(),
}


def choose_kernel(device: torch.device, dtype: torch.dtype, name: str = "auto") -> BlockKernel:
    """The kernel for tensors of that kind, or the one that is named.

    Raises:
        UserError: There is none of that name.
    """
    if name != "auto":
        if name not in KERNELS:
            raise UserError(f"there is no block kernel {name!r}", hint=f"one of: auto, {', '.join(KERNELS)}")
        return KERNELS[name]
    if device.type == "cpu":
        return KERNELS["cpu_flash"]
    if dtype == torch.float64:
        return KERNELS["reference"]
    if dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return KERNELS["efficient"]
    is_hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    return KERNELS["cudnn" if is_hopper and torch.backends.cudnn.is_available() else "cuda_flash"]


def _by_head(*tensors: Tensor) -> Any:
    """Rows and heads exchanged, as torch's kernels have them; views."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _is_faster_in_fp32(k: Tensor) -> bool:
    """Short blocks are, and all of them where there is no AMX; it is no less exact, since out stays fp32.

    Forward and backward of 2,048 rows of 64 elements on a Xeon with AVX-512 BF16 and no AMX: bf16 takes 1.65x
    as long as fp32, conversions included.
    """
    if k.dtype not in (torch.bfloat16, torch.float16):
        return False
    return k.size(1) * k.size(3) <= _SHORT_ON_CPU or not torch.cpu._is_amx_tile_supported()
