"""Core attentions: what stands between the QKV projection and the output projection."""

from megaplug.layers.attention.describe import Sizes, describe
from megaplug.layers.attention.dilated import dilated_attention, ring_attention
from megaplug.layers.attention.modules import RingDilatedAttention, RingMultiheadDilatedAttention

__all__ = [
    "RingDilatedAttention",
    "RingMultiheadDilatedAttention",
    "Sizes",
    "describe",
    "dilated_attention",
    "ring_attention",
]
