"""Exact parameter counts in closed form: of the model as published, as Megatron pads it, and of every rank.

Per layer, with h hidden, q query and k key channels, f the MLP's hidden size and g = 2 (SwiGLU) or 1:
attention ``h(q + 2k) + qh``, MLP ``(g + 1) h f``, two norms of h (twice that for LayerNorm), a router of
``hE`` and E experts in place of the MLP. Around them ``2 V h`` (once if tied) and a final norm.
A norm inside the attention has ``2 q``.
Latent attention has latents of r (queries) and c channels, p rotated channels, v of values and n of keys that
are not rotated: ``h r + r q + h(c + p) + c(n + v) + v h``, and norms of r and c.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megaplug.topology import ModelShape, Topology, coordinates, layer_ids


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one rank holds.

    Attributes:
        dense: Those replicated over data and context parallelism.
        expert: Those of its routed experts, replicated over expert data parallelism only.
    """

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert

    def __add__(self, other: RankParameters) -> RankParameters:
        return RankParameters(self.dense + other.dense, self.expert + other.expert)


def total_parameters(shape: ModelShape, *, padded_for_tp: int | None = None) -> int:
    """Parameters of the whole model.

    Args:
        shape: The model's sizes.
        padded_for_tp: ``None`` for the vocabulary as it is, which is how models are published; a
            tensor-parallel size for Megatron's count, whose vocabulary is padded for it.
    """
    vocab_size = shape.vocab_size if padded_for_tp is None else shape.padded_vocab_size(padded_for_tp)
    layers = _layers(shape, range(shape.num_layers), tp=1, etp=1, experts=shape.num_experts or 0)
    word_embeddings = vocab_size * shape.hidden_size * (2 if shape.untie_embeddings_and_output_weights else 1)
    return layers.total + word_embeddings + _position_embeddings(shape) + _norm(shape)


def active_parameters(shape: ModelShape, *, padded_for_tp: int | None = None) -> int:
    """Parameters that take part in computing one token: only ``moe_router_topk`` of each layer's experts."""
    idle = (shape.num_experts or 0) - min(shape.moe_router_topk, shape.num_experts or 0)
    unused = sum(shape.moe_layers) * idle * _expert(shape, etp=1)
    return total_parameters(shape, padded_for_tp=padded_for_tp) - unused


def stage_parameters(shape: ModelShape, topology: Topology, stage: int) -> RankParameters:
    """Parameters of any rank on a pipeline stage: the layout makes all of them equal.

    Tied embeddings are held by the first and the last stage, each with a copy of its own.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    held = [layer for chunk in layer_ids(topology, shape.num_layers, stage) for layer in chunk]
    experts = (shape.num_experts or 0) // topology.ep
    count = _layers(shape, held, tp=topology.tp, etp=topology.etp, experts=experts)
    word_embedding = shape.padded_vocab_size(topology.tp) // topology.tp * shape.hidden_size
    is_first, is_last = stage == 0, stage == topology.pp - 1
    dense = 0
    if is_first:
        dense += word_embedding + _position_embeddings(shape)
    if is_last:
        dense += _norm(shape)
        if shape.untie_embeddings_and_output_weights or not is_first:
            dense += word_embedding
    return count + RankParameters(dense, 0)


def rank_parameters(shape: ModelShape, topology: Topology, rank: int) -> RankParameters:
    """Parameters of one rank.

    Raises:
        ValueError: If the world has no such rank.
        UserError: If the layers cannot be dealt out to the stages.
    """
    return stage_parameters(shape, topology, coordinates(topology, rank)["pp"])


def _layers(shape: ModelShape, layers: Iterable[int], *, tp: int, etp: int, experts: int) -> RankParameters:
    held, has_experts = list(layers), shape.moe_layers
    with_experts = sum(has_experts[layer] for layer in held)
    dense = len(held) * (_attention(shape, tp) + 2 * _norm(shape))
    expert = 0
    if with_experts < len(held):
        dense += (len(held) - with_experts) * _mlp(shape, shape.ffn_hidden_size, tp)
    if with_experts:
        dense += with_experts * _router_and_shared(shape, tp)
        expert = with_experts * experts * _expert(shape, etp)
    return RankParameters(dense, expert)


def _attention(shape: ModelShape, tp: int) -> int:
    if shape.multi_latent_attention:
        return _latent_attention(shape, tp)
    hidden, query, qkv = shape.hidden_size, shape.query_size, shape.query_size + 2 * shape.key_size
    count = hidden * qkv // tp + query * hidden // tp
    if shape.add_bias_linear or shape.add_qkv_bias:
        count += qkv // tp
    if shape.add_bias_linear:
        count += hidden
    if shape.qk_layernorm:
        count += 2 * _norm(shape, shape.head_size)
    if shape.sub_layer_norm:
        count += 2 * query // tp
    return count


def _latent_attention(shape: ModelShape, tp: int) -> int:
    """As the native backend cuts it; Transformer Engine keeps the down-projections whole on every rank."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    of_queries, of_keys_values = shape.latent_sizes
    count = hidden * (of_keys_values + shape.qk_pos_emb_head_dim) // tp
    count += of_keys_values * heads * (shape.qk_head_dim + shape.v_head_dim) // tp
    count += shape.value_size * hidden // tp
    if of_queries:
        count += hidden * of_queries // tp + of_queries * shape.query_size // tp
    else:
        count += hidden * shape.query_size // tp
    if shape.qk_layernorm:
        count += sum(_norm(shape, size) for size in shape.latent_sizes if size)
    return count + (hidden if shape.add_bias_linear else 0)


def _mlp(shape: ModelShape, ffn: int, tp: int) -> int:
    """Two linear layers; the second's bias is whole on every tensor-parallel rank."""
    gates = 2 if shape.swiglu else 1
    count = (gates + 1) * shape.hidden_size * ffn // tp
    if shape.add_bias_linear:
        count += gates * ffn // tp + shape.hidden_size
    return count


def _expert(shape: ModelShape, etp: int) -> int:
    return _mlp(shape, shape.expert_ffn_size, etp)


def _router_and_shared(shape: ModelShape, tp: int) -> int:
    experts = shape.num_experts or 0
    count = experts * shape.hidden_size + (experts if shape.add_bias_linear else 0)
    shared = shape.moe_shared_expert_intermediate_size
    return count + (_mlp(shape, shared, tp) if shared else 0)


def _norm(shape: ModelShape, size: int | None = None) -> int:
    return (size or shape.hidden_size) * (2 if shape.normalization == "LayerNorm" else 1)


def _position_embeddings(shape: ModelShape) -> int:
    if shape.position_embedding_type != "learned_absolute":
        return 0
    return (shape.max_position_embeddings or shape.seq_length) * shape.hidden_size
