"""From a name and parameters to the layers that Megatron builds on a pipeline stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_submodules,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megaplug.errors import UserError
from megaplug.layers.attention.latent import core_attention_spec, latent_attention_spec
from megaplug.layers.attention.rotary import RotarySelfAttention
from megaplug.layers.attention.sub_norm import RingMultiheadDilatedAttention, xavier_projections
from megaplug.layers.backend import core_attention_builder, experts_builder, native_provider
from megaplug.layers.registry import AttentionLayers, ExpertsChoice
from megaplug.layers.swiglu import SwiGLUMLP

# The checkpoint keys of a norm that Transformer Engine fuses with the linear layer after it: with them
# a checkpoint of one backend loads into the other.
_FUSED_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def transformer_layer_spec(
    attention: AttentionLayers, backend: str, experts: ExpertsChoice | None = None
) -> Callable[..., TransformerBlockSubmodules]:
    """What ``GPTModelConfig.transformer_layer_spec`` takes.

    Args:
        attention: The core attention of each layer of the whole model.
        backend: ``native`` or ``te``.
        experts: Of the layers that are mixtures of experts; the default's where it is None. The backend
            ``te`` has its own.

    Returns:
        A function of a ``GPTModelConfig`` (or ``TransformerConfig``) and a virtual pipeline stage, which
        builds a new spec at every call, since Megatron changes specs.

    Raises:
        UserError: An attention cannot be had; asked here, before any model is built.
    """
    if backend not in ("native", "te"):
        raise UserError(f"layers are built for the backends native and te, not {backend!r}")
    for name in attention.names:
        core_attention_builder(name, attention.params_of(name))
    build_experts = experts_builder(experts or ExpertsChoice())

    def build(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        transformer: TransformerConfig = getattr(config, "transformer", config)
        _refuse_unsupported(transformer)
        if transformer.multi_latent_attention or backend == "te":
            _refuse_sub_norm(attention)
        if backend == "te":
            return _te_block(transformer, vp_stage, attention)
        norm = transformer.normalization
        providers = {
            name: native_provider(
                name, attention.params_of(name), norm, transformer.num_query_groups, build_experts
            )
            for name in attention.names
        }
        is_moe = moe_pattern(transformer.num_layers, transformer.num_moe_experts, transformer.moe_layer_freq)
        layers = [
            _native_layer(transformer, providers[attention.name_of(layer)], is_moe[layer], attention)
            for layer in stage_layers(transformer, vp_stage)
        ]
        return TransformerBlockSubmodules(
            layer_specs=layers, layer_norm=providers[attention.names[0]].layer_norm()
        )

    return build


def moe_pattern(num_layers: int, num_moe_experts: int | None, moe_layer_freq: int | list[int]) -> list[bool]:
    """For each layer of the whole model whether it is a mixture of experts.

    An integer N makes every Nth layer one, from the first; a list says it layer by layer.

    Raises:
        UserError: A list of another length than the layers, or with anything but 0 and 1.
    """
    if num_moe_experts is None:
        return [False] * num_layers
    if isinstance(moe_layer_freq, int):
        return [layer % moe_layer_freq == 0 for layer in range(num_layers)]
    if len(moe_layer_freq) != num_layers or not set(moe_layer_freq) <= {0, 1}:
        raise UserError(
            f"moe.moe_layer_freq is {moe_layer_freq} for {num_layers} layers",
            hint="give an integer, or a list with a 0 or a 1 for each layer",
        )
    return [bool(entry) for entry in moe_layer_freq]


def stage_layers(config: TransformerConfig, vp_stage: int | None) -> list[int]:
    """The layers that this rank's (virtual) pipeline stage builds, counted from 0 in the whole model."""
    if (layout := config.pipeline_model_parallel_layout) is not None:
        return list(layout.get_layer_id_list(LayerType.decoder, vp_stage=vp_stage))
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage)))


def _native_layer(
    config: TransformerConfig, backend: BackendSpecProvider, is_moe: bool, layers: AttentionLayers
) -> ModuleSpec:
    """As Megatron's ``get_gpt_layer_local_submodules``, which takes no backend."""
    num_experts = config.num_moe_experts if is_moe else None
    latent = config.multi_latent_attention
    attention = latent_attention_spec(config, backend) if latent else _attention_spec(config, backend, layers)
    submodules = TransformerLayerSubmodules(
        input_layernorm=backend.layer_norm(has_residual=True),
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=backend.layer_norm(has_residual=True),
        mlp=_mlp(config, backend, num_experts),
        mlp_bda=get_bias_dropout_add,
        # Transformer Engine's latent attention has its norms elsewhere: no checkpoint of it loads here.
        sharded_state_dict_keys_map={} if latent else dict(_FUSED_NORM_KEYS),
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _attention_spec(
    config: TransformerConfig, backend: BackendSpecProvider, layers: AttentionLayers
) -> ModuleSpec:
    qk_norm: Any = IdentityOp
    if config.qk_l2_norm:
        qk_norm = L2Norm
    elif config.qk_layernorm:
        qk_norm = backend.layer_norm(for_qk=True)
    qkv: Any = backend.column_parallel_linear()
    proj: Any = backend.row_parallel_linear()
    if layers.gamma_init is not None:
        qkv, proj = xavier_projections(qkv, proj, layers.gamma_init)
    submodules = SelfAttentionSubmodules(
        linear_qkv=qkv,
        core_attention=backend.core_attention(),
        linear_proj=proj,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    module = RingMultiheadDilatedAttention if layers.sub_layer_norm else RotarySelfAttention
    return ModuleSpec(module=module, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)


def _mlp(config: TransformerConfig, backend: BackendSpecProvider, num_experts: int | None) -> Any:
    """Ours for a dense layer; Megatron's for a mixture of experts, with the backend's experts."""
    if num_experts is not None:
        return get_mlp_module_spec_for_backend(
            backend=backend, num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm
        )
    linears = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    return partial(SwiGLUMLP.as_mlp_submodule, submodules=linears)


def _te_block(
    config: TransformerConfig, vp_stage: int | None, attention: AttentionLayers
) -> TransformerBlockSubmodules:
    """Megatron's own Transformer Engine layers, with another core attention where one was named."""
    from megatron.core.extensions.transformer_engine import TENorm

    layers = []
    is_moe = moe_pattern(config.num_layers, config.num_moe_experts, config.moe_layer_freq)
    for layer in stage_layers(config, vp_stage):
        submodules = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=config.num_moe_experts if is_moe[layer] else None,
            moe_grouped_gemm=config.moe_grouped_gemm if is_moe[layer] else False,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            qk_l2_norm=config.qk_l2_norm,
            use_te_activation_func=config.use_te_activation_func,
        )
        if (name := attention.name_of(layer)) != "te":
            builder = core_attention_builder(name, attention.params_of(name), config.num_query_groups)
            core_attention = core_attention_spec(builder) if config.multi_latent_attention else builder
            submodules.self_attention.submodules.core_attention = core_attention
        layers.append(ModuleSpec(module=TransformerLayer, submodules=submodules))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)


def _refuse_sub_norm(attention: AttentionLayers) -> None:
    if attention.sub_layer_norm or attention.gamma_init is not None:
        raise UserError(
            "latent attention and the layers of Transformer Engine have no sub_layer_norm and no gamma_init",
            hint="leave them out, or use backend=native",
        )


def _refuse_unsupported(config: TransformerConfig) -> None:
    """Name the features that Megatron builds other layers for."""
    wanted = {
        "experimental_attention_variant": config.experimental_attention_variant is not None,
        "use_kitchen": config.use_kitchen,
        "heterogeneous_block_specs": config.heterogeneous_block_specs,
    }
    if refused := [name for name, is_wanted in wanted.items() if is_wanted]:
        raise UserError(f"the layer builder has no {', '.join(refused)}", hint="leave it out of megatron.*")
