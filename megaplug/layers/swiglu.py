"""An MLP whose SwiGLU is one autograd function, which writes both gradients where they are wanted."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from torch import Tensor
from torch.nn import functional as F


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``x = [gate, up]`` (Shazeer 2020, eq. 5).

    Args:
        x: ``[..., 2 F]``.

    Returns:
        ``[..., F]`` in the dtype of ``x``, rounded after the SiLU and after the product.
    """
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """With ``s = silu(gate)``: ``d_up = g s`` and ``d_gate = g up silu'(gate)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        s = F.silu(gate)
        ctx.save_for_backward(x, s)
        return s * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        d_x = torch.empty_like(x)
        d_gate, d_up = d_x.chunk(2, -1)
        torch.mul(grads[0], s, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=d_gate)
        return d_x


class SwiGLUMLP(MLP):
    """Megatron's MLP, with the same parameters; its own way wherever it is more than SwiGLU, or compiled."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._is_plain = (
            config.gated_linear_unit
            and config.activation_func is F.silu
            and not config.bias_activation_fusion
            and not config.use_te_activation_func
            and not config.add_bias_linear
            and config.activation_func_clamp_value is None
            and config.glu_linear_offset == 0.0
        )

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: ``[S, B, H]`` to ``[S, B, H]`` and the bias, which is left to be added."""
        if not self._is_plain or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        gate_and_up, _ = apply_module(self.linear_fc1)(hidden_states)
        return apply_module(self.linear_fc2)(swiglu(gate_and_up))
