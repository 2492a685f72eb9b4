"""Which attention each layer of a job has."""

from __future__ import annotations

from megaplug.job.schema import AttentionConfig
from megaplug.layers.registry import AttentionLayers


def attention_layers(config: AttentionConfig) -> AttentionLayers:
    """What the keys of the group say of the layers; they need not have been checked."""
    return AttentionLayers(
        tuple(config.pattern or (config.name,)),
        {**config.pattern_params, config.name: config.params},
        config.sub_layer_norm,
        config.gamma_init,
    )


def name_key(config: AttentionConfig) -> str:
    """The key under which attentions are named."""
    return "attention.name" if config.pattern is None else "attention.pattern"


def params_key(config: AttentionConfig, name: str) -> str:
    """The key under which the parameters of an attention stand."""
    return "attention.params" if name == config.name else f"attention.pattern_params.{name}"
