"""Self-attention that splits the QKV projection and rotates queries and keys in one autograd function.

Shape letters: S tokens, B micro-batch, G key-value heads (groups), N query heads a group, D elements a head,
R of them rotated.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.typed_torch import apply_module
from torch import Tensor

_SHORT = 32  # elements


def split_and_rotate(
    mixed_SBGM: Tensor, cos_SR: Tensor, sin_SR: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of the QKV projection, the first two rotated.

    Su et al. 2021, eq. 34, on the halves of a head as in Llama.
    With ``x = [a, b, rest]`` of R/2, R/2 and D - R elements: ``[a cos - b sin, b cos + a sin, rest]``.

    Args:
        mixed_SBGM: ``[S, B, G, (N + 2) D]``, each group's query heads, then its key, then its value.
        cos_SR: Cosines of the angles, in the dtype of the projection.
        sin_SR: Sines.
        head_dim: D.

    Returns:
        ``[S, B, G N, D]``, ``[S, B, G, D]`` and ``[S, B, G, D]``, contiguous.
    """
    return _SplitAndRotate.apply(mixed_SBGM, cos_SR, sin_SR, head_dim)


class _SplitAndRotate(torch.autograd.Function):
    """The gradient is the rotation by the opposite angles, written where the projection wants its own."""

    @staticmethod
    def forward(ctx: Any, mixed_SBGM: Tensor, cos_SR: Tensor, sin_SR: Tensor, head_dim: int) -> Any:
        heads_SBGND = mixed_SBGM.unflatten(-1, (-1, head_dim))
        if _turns_whole(heads_SBGND, cos_SR):
            ctx.save_for_backward(cos_SR, sin_SR)
            turned = _turned(heads_SBGND, *_factors(cos_SR, _signed(sin_SR), heads_SBGND.size(3)))
            q, k, v = (part.clone(memory_format=torch.contiguous_format) for part in _parts(turned))
            return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        cos, sin = cos_SR[:, None, None, None], _signed(sin_SR)[:, None, None, None]
        q, k, v = _parts(heads_SBGND)
        q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k_out = torch.empty(k.shape, dtype=q.dtype, device=q.device)
        _rotate(q, cos, sin, q_out)
        _rotate(k, cos, sin, k_out)
        ctx.save_for_backward(cos_SR, sin_SR)
        # A copy of the values lets go of the projection, which nothing else keeps.
        return (
            q_out.flatten(2, 3),
            k_out.squeeze(3),
            v.squeeze(3).clone(memory_format=torch.contiguous_format),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_SR, sin_SR = ctx.saved_tensors
        d_q, d_k, d_v = grads
        num_groups = d_k.size(2)
        d_q = d_q.unflatten(2, (num_groups, -1))
        if _turns_whole(d_q, cos_SR):
            d_heads = torch.cat((d_q, d_k.unsqueeze(3), d_v.unsqueeze(3)), 3)
            factors = _factors(cos_SR, _signed_back(sin_SR), d_heads.size(3))
            return _turned(d_heads, *factors).flatten(3), None, None, None
        cos = cos_SR[:, None, None, None]
        sin = _signed_back(sin_SR)[:, None, None, None]
        shape = (*d_q.shape[:3], d_q.size(3) + 2, d_q.size(4))
        d_mixed = torch.empty(shape, dtype=d_q.dtype, device=d_q.device)
        parts = _parts(d_mixed)
        _rotate(d_q, cos, sin, parts[0])
        _rotate(d_k.unsqueeze(3), cos, sin, parts[1])
        parts[2].copy_(d_v.unsqueeze(3))
        return d_mixed.flatten(3), None, None, None


def _turns_whole(heads_SBGND: Tensor, cos_SR: Tensor) -> bool:
    """Whether values are turned too, by no angle: on a CPU one long loop takes half as long as many short."""
    return heads_SBGND.device.type == "cpu" and cos_SR.size(-1) == heads_SBGND.size(-1)


def _turned(heads_SBGND: Tensor, cos_S11ND: Tensor, sin_S11ND: Tensor) -> Tensor:
    partners = heads_SBGND.roll(heads_SBGND.size(-1) // 2, -1)
    return (heads_SBGND * cos_S11ND).addcmul_(partners, sin_S11ND)


@functools.lru_cache(maxsize=4)
def _factors(cos_SR: Tensor, sin_SR: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """``[S, 1, 1, N + 2, R]``: cosines and signed sines of queries and keys; 1 and 0 of the value.

    Once for all layers, there and back.
    """
    shape = (cos_SR.size(0), 1, 1, num_heads, cos_SR.size(1))
    cos, sin = cos_SR.new_ones(shape), sin_SR.new_zeros(shape)
    cos[..., :-1, :] = cos_SR[:, None, None, None]
    sin[..., :-1, :] = sin_SR[:, None, None, None]
    return cos, sin


@functools.lru_cache(maxsize=2)
def _signed(sin_SR: Tensor) -> Tensor:
    """``[-sin, sin]``, once for all layers."""
    half = sin_SR.size(-1) // 2
    return torch.cat((-sin_SR[:, :half], sin_SR[:, half:]), -1)


@functools.lru_cache(maxsize=2)
def _signed_back(sin_SR: Tensor) -> Tensor:
    """Back by the same angle: what an element gave its partner, and so its partner's signed sine."""
    return _signed(sin_SR).roll(sin_SR.size(-1) // 2, -1)


def _parts(heads_SBGND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the query heads, the key and the value of each group, each with a dimension for its heads."""
    return heads_SBGND[..., :-2, :], heads_SBGND[..., -2:-1, :], heads_SBGND[..., -1:, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """``out[a] = a cos - b sin``, ``out[b] = b cos + a sin``, the rest as it is.

    ``sin`` comes with the signs of its elements. Short halves are swapped in a copy: a row of fewer than 32
    elements is too short for a kernel to be worth its start.
    """
    size = cos.size(-1)
    half = size // 2
    torch.mul(x[..., :size], cos, out=out[..., :size])
    if half < _SHORT:
        out[..., :size].addcmul_(torch.cat((x[..., half:size], x[..., :half]), -1), sin)
    else:
        out[..., :half].addcmul_(x[..., half:size], sin[..., :half])
        out[..., half:size].addcmul_(x[..., :half], sin[..., half:])
    if size < x.size(-1):
        out[..., size:].copy_(x[..., size:])


@functools.lru_cache(maxsize=2)
def _cos_sin(angles_S11R: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of Megatron's angles, which it computes once; all layers then share these."""
    angles = angles_S11R.flatten(1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, with the same parameters; its own way where it is more than plain RoPE."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self._is_plain = (
            all(norm is None or isinstance(norm, IdentityOp) for norm in (self.q_layernorm, self.k_layernorm))
            and config.num_query_groups >= self.world_size
            and not config.attention_output_gate
            and not config.rotary_interleaved
            and not config.apply_rope_fusion
            and not config.multi_latent_attention
            and config.mrope_section is None
            and not config.fused_single_qkv_rope
            and not config.test_mode
        )
        self._angles: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: ``[S, B, H]`` to ``[S, B, H]`` and the bias, which is left to be added."""
        is_ours = (
            self._is_plain
            and isinstance(rotary_pos_emb, Tensor)
            and rotary_pos_emb.shape[1:3] == (1, 1)
            and not args
            and all(kwargs.get(name) is None for name in ("inference_context", "packed_seq_params"))
            and not InferenceMode.is_active()
        )
        if not is_ours:
            return super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, **kwargs)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Queries, keys and values, rotated already where ``forward`` took the angles from Megatron."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, _ = apply_module(self.linear_qkv)(hidden_states)
        mixed_SBGM = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        cos, sin = _cos_sin(self._angles, self._yarn_concentration_factor, mixed.dtype)
        return split_and_rotate(mixed_SBGM, cos, sin, self.hidden_size_per_attention_head)
