"""What one attention layer costs: operations of its forward pass and bytes that it keeps."""

from __future__ import annotations

from megaplug.layers.registry.plugin import AttentionSizes


def causal_flops(sizes: AttentionSizes) -> int:
    """Two matrix products over the lower triangle, diagonal included: ``2 b h (d + d_v) s (s + 1) / 2``."""
    pairs = sizes.seq_length * (sizes.seq_length + 1) // 2
    return 2 * sizes.batch_size * sizes.num_heads * sizes.summed_head_dim * pairs


def full_flops(sizes: AttentionSizes) -> int:
    """Two matrix products over the whole square, the masked half included: ``2 b h (d + d_v) s^2``."""
    return 2 * sizes.batch_size * sizes.num_heads * sizes.summed_head_dim * sizes.seq_length**2


def fused_bytes(sizes: AttentionSizes) -> int:
    """Query, key, value, output and one fp32 log-sum-exp a head are kept for the backward pass."""
    elements = (sizes.num_heads + sizes.num_kv_heads) * sizes.summed_head_dim
    return elements * sizes.element_size + 4 * sizes.num_heads


def unfused_bytes(sizes: AttentionSizes) -> int:
    """Query, K and V repeated for every head, and a row of probabilities a head.

    Below fp32 the softmax is taken in fp32 and its result is kept beside the one that is multiplied
    with the values (``FusedScaleMaskSoftmax.forward_torch_softmax`` of megatron-core 0.19).
    """
    row = sizes.element_size if sizes.element_size >= 4 else sizes.element_size + 4
    return sizes.num_heads * (3 * sizes.head_dim * sizes.element_size + sizes.seq_length * row)
