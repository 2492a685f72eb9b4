"""Core attentions: what stands between the QKV projection and the output projection."""

from megaplug.layers.attention.dilated import dilated_attention, ring_attention

__all__ = ["dilated_attention", "ring_attention"]
