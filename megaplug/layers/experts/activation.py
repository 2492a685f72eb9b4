"""What stands between an expert's two linear layers, for the rows of all experts at once.

Shape letters: T rows, F elements of an expert's width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


def activate(x: Tensor, probs_T: Tensor, config: TransformerConfig) -> Tensor:
    """The activation that the config names, times the probability by which each row was sent to its expert.

    Args:
        x: ``[T, 2 F]``, gate and up, where the config is gated; else ``[T, F]``.
        probs_T: Of each row, in the router's dtype.
        config: Of it ``activation_func``, ``gated_linear_unit``, ``activation_func_clamp_value`` and
            ``glu_linear_offset`` are read.

    Returns:
        ``[T, F]`` in the dtype of x; the product with the probability is rounded once.
    """
    if is_swiglu(config):
        return _WeightedSwiGLU.apply(x, probs_T)
    if not config.gated_linear_unit:
        return (config.activation_func(x) * probs_T.unsqueeze(-1)).to(x.dtype)
    clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset
    gate, up = x.chunk(2, -1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return (config.activation_func(gate) * (up + offset) * probs_T.unsqueeze(-1)).to(x.dtype)


def is_swiglu(config: TransformerConfig) -> bool:
    """Whether it is ``silu(gate) up`` and no more."""
    has_more = config.activation_func_clamp_value is not None or config.glu_linear_offset
    return bool(config.gated_linear_unit and config.activation_func is F.silu and not has_more)


class _WeightedSwiGLU(torch.autograd.Function):
    """``p silu(gate) up``; of it x and p are kept.

    With ``s = silu(gate)``: ``d_p = sum g s up``, ``d_up = p g s``, ``d_gate = p g up silu'(gate)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(x, probs)
        gate, up = x.chunk(2, -1)
        return (F.silu(gate).mul_(up) * probs.unsqueeze(-1)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, probs = ctx.saved_tensors
        (d_out,) = grads
        gate, up = x.chunk(2, -1)
        s = F.silu(gate)
        d_x = torch.empty_like(x)
        d_gate, d_up = d_x.chunk(2, -1)
        torch.mul(d_out, s, out=d_up)
        # In the dtype of the probabilities, and one such tensor at a time.
        products = d_up * up if probs.dtype == x.dtype else d_up.to(probs.dtype).mul_(up)
        d_probs = products.sum(-1)
        del products
        weighted = (d_out * probs.unsqueeze(-1)).to(x.dtype)
        torch.mul(weighted, s, out=d_up)
        torch.ops.aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=d_gate)
        return d_x, d_probs
