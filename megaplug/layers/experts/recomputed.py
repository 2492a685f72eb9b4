"""An activation and the linear layers after it, of which the backward pass computes the activation again.

Megatron's ``CheckpointWithoutOutput`` keeps as little, and compiles a C++ extension when it first runs; here
the linear layers are ours, so that what is between need not be kept in the first place.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaplug.layers.experts.activation import activate
from megaplug.layers.experts.grouped_linear import products, weight_gradient


def activated_linear(
    x: Tensor,
    probs_T: Tensor,
    weight_ENF: Tensor,
    counts: tuple[int, ...],
    kernel: str,
    config: TransformerConfig,
) -> Tensor:
    """``grouped_linear(activate(x, probs))``, of which x, the probabilities and the weight are kept.

    Args:
        x: ``[T, 2 F]`` where the config is gated; else ``[T, F]``.
        probs_T: Of each row.
        weight_ENF: As ``torch.nn.Linear`` has them.
        counts: Rows of each expert.
        kernel: ``grouped_mm`` or ``loop``.
        config: See ``activate``.

    Returns:
        ``[T, N]`` in the dtype of x.
    """
    return _ActivatedLinear.apply(x, probs_T, weight_ENF, counts, kernel, config)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probs: Tensor,
        weight: Tensor,
        counts: tuple[int, ...],
        kernel: str,
        config: TransformerConfig,
    ) -> Tensor:
        ctx.save_for_backward(x, probs, weight)
        ctx.counts, ctx.kernel, ctx.config = counts, kernel, config
        return products(activate(x, probs, config), weight.transpose(1, 2), counts, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        x, probs, weight = ctx.saved_tensors
        leaves = [each.detach().requires_grad_() for each in (x, probs)]
        with torch.enable_grad():
            hidden = activate(leaves[0], leaves[1], ctx.config)
        d_hidden = products(d_out, weight, ctx.counts, ctx.kernel)
        d_x, d_probs = torch.autograd.grad(hidden, leaves, d_hidden)
        wanted = ctx.needs_input_grad[2]
        found = weight_gradient(weight, d_out, hidden.detach(), ctx.counts, ctx.kernel) if wanted else None
        return d_x, d_probs, found, None, None, None
