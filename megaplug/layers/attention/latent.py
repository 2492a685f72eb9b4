"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) without Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaplug.errors import UserError


class LatentSelfAttention(MLASelfAttention):
    """Megatron's, with the norms where DeepSeek has them, and right gradients under tensor parallelism.

    Megatron 0.19 builds the norm of a query that has no latent into the projection before it, which only
    Transformer Engine can do; DeepSeek-V2-Lite has no norm there. And where its down-projections are cut
    over the tensor-parallel ranks, as they are without Transformer Engine, each rank's gradient of the
    keys' rotated part is that of its own heads only: nobody sums them.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The latent of queries, and that of keys and values with the rotated part, gathered whole."""
        queries, part_SBX = super()._qkv_down_projection(hidden_states)
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if part_SBX.size(-1) == sum(sizes):
            return queries, part_SBX
        if not self.config.sequence_parallel:
            raise UserError(
                "latent attention with tensor parallelism needs sequence parallelism",
                hint="set topology.sequence_parallel=true",
            )
        whole_SBX = gather_from_tensor_model_parallel_region(part_SBX, group=self.tp_group)
        # What comes after gathers the rotated part again, and so sums its gradients.
        return queries, scatter_to_sequence_parallel_region(whole_SBX, group=self.tp_group)

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }


def latent_attention_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """The self-attention of a layer, of the backend's linear layers, norms and core attention."""
    linear: Any = backend.column_parallel_linear()
    norm: Any = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=linear,
        linear_q_down_proj=linear,
        linear_q_up_proj=linear,
        linear_kv_down_proj=linear,
        linear_kv_up_proj=linear,
        core_attention=core_attention_spec(backend.core_attention()),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=norm,
        kv_layernorm=norm,
    )
    return ModuleSpec(
        module=LatentSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules
    )


def core_attention_spec(builder: Callable[..., Any]) -> Any:
    """A core attention as Megatron's latent attention takes it: a class, or a spec with parameters."""
    if isinstance(builder, partial):
        return ModuleSpec(module=builder.func, params=dict(builder.keywords))
    return builder
