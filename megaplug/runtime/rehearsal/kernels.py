"""What CUDA's kernels allocate and keep, on torch's ``meta`` device, which would decompose them.

Our layers ask a tensor's device which kernel they may take; a rehearsal of a job for CUDA takes CUDA's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megaplug.layers import cross_entropy, norm
from megaplug.layers.attention import block_kernels, flash
from megaplug.layers.attention.merging import choose_merge


def install() -> None:
    """Have our layers take CUDA's kernels on tensors without numbers."""
    norm_class: Any = norm.RMSNorm
    norm_class.forward = lambda self, x: _FusedRMSNorm.apply(x, self.weight, self.eps)
    attention: Any = flash
    attention._is_faster_in_fp32 = lambda keys: False
    attention._knows_groups = lambda query, cuda_kernel: (
        query.dtype != torch.float32 and cuda_kernel != "efficient"
    )
    attention._attend = _attend
    blocks: Any = block_kernels
    blocks._on_cuda = lambda device, dtype, *_: "efficient" if dtype == torch.float32 else "cuda_flash"
    # A kernel of Triton's needs a GPU; both merge in place.
    attending: Any = importlib.import_module("megaplug.layers.attention.dilated")
    attending.choose_merge = lambda name, device: choose_merge("torch", device)
    losses: Any = cross_entropy
    losses._ELEMENTS_ON_CPU = losses._ELEMENTS_ON_CUDA
    namespace: Any = torch
    namespace.logsumexp = _with_its_copy(torch.logsumexp)
    functions: Any = functional
    functions.dropout = _dropout
    # The fused Adam has a kernel for this device, which torch does not list.
    optimizers: Any = importlib.import_module("torch.optim.adam")
    optimizers._device_dtype_check_for_fused = lambda *args, **kwargs: None


def _with_its_copy(logsumexp: Callable[..., Any]) -> Callable[..., Any]:
    """``logsumexp_out_impl`` makes ``(x - max).exp()`` inside the operator, where nobody sees it."""

    @functools.wraps(logsumexp)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        copy = torch.empty_like(x)
        result = logsumexp(x, *args, **kwargs)
        del copy
        return result

    return run


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``native_dropout``, which ``aten::dropout`` takes on CUDA alone: a mask of one byte an element."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


class _FusedRMSNorm(torch.autograd.Function):
    """``aten::_fused_rms_norm``: keeps its input and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, r)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, kernel: str
) -> Tensor:
    """The flash kernel, or its efficient one, which alone takes fp32, on ``[S, B, heads, D]``."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    if k.dtype == torch.float32 or kernel == "efficient":
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, dropout_p, causal, scale=scale
        )[0]
        return out.permute(2, 0, 1, 3)
    # Kernels take heads of multiples of 8 elements; torch fills others up.
    size = k.size(3)
    if size % 8:
        q, k, v = (functional.pad(x, (0, 8 - size % 8)) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, causal, scale=scale)[0]
    return out[..., :size].permute(2, 0, 1, 3)
