"""Norms that work under sequence parallelism without Transformer Engine or Apex.

Numerics: bf16 and fp16 inputs are normalised and scaled in fp32 and rounded once, to the input's dtype.
(Hugging Face's Llama rounds before it scales: one rounding more.)
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megaplug.errors import UserError


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019, eq. 4).

    Args:
        config: Decides the weight's dtype and whether it is marked for sequence parallelism.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.

    Raises:
        UserError: The config asks for a norm that only other backends have.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        _refuse_foreign_options(config)
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        _mark(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``[..., hidden_size]``; same shape and dtype."""
        if x.device.type == "cpu":
            return _RMSNormOnCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension (Ba et al. 2016).

    Args:
        config: Decides the weights' dtype and whether they are marked for sequence parallelism.
        hidden_size: Size of the last dimension.
        eps: Added to the variance.

    Raises:
        UserError: The config asks for a norm that only other backends have.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        _refuse_foreign_options(config)
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        _mark(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``[..., hidden_size]``; same shape and dtype."""
        return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """``F.rms_norm`` is one kernel on CUDA only; on a CPU its backward pass is a dozen of them.

    With ``r = 1 / sqrt(mean(x^2) + eps)``, ``n = x r`` and ``y = n w``, for a gradient ``g`` of ``y``:
    ``dw = sum(g n)`` over the rows and ``dx = r (g w - n mean(g w n))``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keep ``x`` and one ``r`` a row."""
        wide = _widened(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of ``x`` and the weight."""
        x, weight, r = ctx.saved_tensors
        g = _widened(grads[0])
        n = _widened(x) * r
        g_n = g * n
        d_weight = g_n.flatten(0, -2).sum(0).to(weight.dtype)
        minus_mean = g_n.mul_(weight).sum(-1, keepdim=True).div_(-x.size(-1))
        d_x = (g * weight).addcmul_(n, minus_mean).mul_(r)
        return d_x.to(x.dtype), d_weight, None


def _widened(x: Tensor) -> Tensor:
    """``x`` in fp32, or as it is when it is no narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _mark(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Tell Megatron which gradients to sum over the tensor-parallel ranks.

    Under sequence parallelism each rank normalises other tokens, so each has only a part of the
    gradient (``_allreduce_non_tensor_model_parallel_grads`` reads this attribute).
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel


def _refuse_foreign_options(config: TransformerConfig) -> None:
    # persist_layer_norm is left out: it names a kernel of Apex's with the same result.
    for option in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm", "fused_residual_rmsnorm"):
        if getattr(config, option, False):
            raise UserError(
                f"the native norms have no {option}",
                hint="leave it off, or use backend=te",
            )
