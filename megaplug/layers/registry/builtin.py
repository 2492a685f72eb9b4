"""The layers that come with megaplug, core attentions first."""

from __future__ import annotations

from megaplug.layers.registry.cost import causal_flops, full_flops, fused_bytes, unfused_bytes
from megaplug.layers.registry.dilated import LONG
from megaplug.layers.registry.experts import BUILT_IN_EXPERTS
from megaplug.layers.registry.plugin import CORE_ATTENTION, Limits, Parameter, Plugin

_SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")
_TE = "megatron.core.extensions.transformer_engine:TEDotProductAttention"


FLASH = Plugin(
    name="flash",
    kind=CORE_ATTENTION,
    target="megaplug.layers.attention.flash:FlashAttention",
    doc="torch's fused kernels: no scores in memory, keys and values shared by a group are never repeated",
    parameters={
        "cuda_kernel": Parameter(
            str,
            "auto",
            "which of torch's fused kernels runs on CUDA; efficient is the only one with fp32",
            ("auto", "flash", "cudnn", "efficient"),
        )
    },
    limits=Limits(
        dtypes={"cpu": ("fp64", "fp32", "bf16", "fp16"), "cuda": ("fp32", "bf16", "fp16")},
        dropout_devices=("cuda",),
        latent_attention=True,
        multi_token_prediction=True,
        masks=("causal", "no_mask"),
        max_head_dim={"cuda": 256},
        head_dim_multiple={"cuda": 8},
    ),
    forward_flops=causal_flops,
    saved_bytes_per_token=fused_bytes,
)

LOCAL = Plugin(
    name="local",
    kind=CORE_ATTENTION,
    target="megatron.core.transformer.dot_product_attention:DotProductAttention",
    doc="Megatron's own unfused attention: every score in memory; to compare with",
    limits=Limits(
        dropout_devices=("cpu", "cuda"),
        sliding_window=True,
        softmax_types=_SOFTMAX_TYPES,
        multi_token_prediction=True,
        masks=("causal", "padding", "arbitrary"),
    ),
    forward_flops=full_flops,
    saved_bytes_per_token=unfused_bytes,
)

TE = Plugin(
    name="te",
    kind=CORE_ATTENTION,
    target=_TE,
    doc="Transformer Engine's attention, with its context parallelism",
    limits=Limits(
        devices=("cuda",),
        dtypes={"cuda": ("fp32", "bf16", "fp16")},
        dropout_devices=("cuda",),
        context_parallel=True,
        packed_sequences=True,
        attention_bias=True,
        latent_attention=True,
        sliding_window=True,
        softmax_types=_SOFTMAX_TYPES,
        largest_scores=True,
        batch_invariant=True,
        communication=True,
        multi_token_prediction=True,
        masks=("causal", "no_mask", "padding", "padding_causal", "arbitrary", "causal_bottom_right"),
        max_head_dim={"cuda": 256},
        head_dim_multiple={"cuda": 8},
        requires=("transformer_engine",),
    ),
    forward_flops=causal_flops,
    saved_bytes_per_token=fused_bytes,
)

ATTENTIONS = (FLASH, LOCAL, TE, *LONG)
BUILT_IN = (*ATTENTIONS, *BUILT_IN_EXPERTS)
