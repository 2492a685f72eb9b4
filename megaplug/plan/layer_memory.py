"""What one layer keeps of one microbatch for its backward pass, in bytes: modelled.

Flash attention keeps no scores. With T tokens of a microbatch on a rank, e bytes a number, t = tp, and S = t
under sequence parallelism or 1, a dense layer keeps ``4 T h e / S`` (the inputs of two norms and what comes
out of them, which the linear layers keep), ``T (q + 2 k) e / t`` (queries, keys and values), ``T q e / t``
(what attention gives) and ``T f (g + 1) e / t`` (before and after the activation function; g is 2 for
SwiGLU). That is Korthikanti et al. 2022, section 4, with grouped queries, SwiGLU and without dropout. What
differs by code path is named beside each term; all were counted in the modules themselves
(``benchmarks/rehearse_random.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.workload import Workload

_FP32 = 4
_INDEX = 8
# Logits, probabilities and maps of the router, bytes for each of T / S tokens and each expert of the model.
_ROUTER = 13


@dataclass(frozen=True)
class AttentionKept:
    """Bytes that attention keeps, between the norm before it and the one after it.

    Attributes:
        projected: Queries, keys and values as they go into the core attention, and what stays beside them.
        out: What comes out of it: the input of the output projection.
        scores: Softmax and dropout of unfused attention, or the logarithms that flash attention keeps.
    """

    projected: float
    out: float
    scores: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.projected + self.out + self.scores


@dataclass(frozen=True)
class ExpertTokens:
    """Copies of tokens that a rank's experts see, with a balanced router.

    Attributes:
        sent: Copies that the rank sends: ``topk`` of each of its T / S tokens.
        seen: Copies that its experts compute, gathered over expert tensor parallelism.
        of_one: Copies that go through one matrix product: an expert's, or all if experts are grouped.
    """

    sent: float
    seen: float
    of_one: float


def attention_kept(workload: Workload) -> AttentionKept:
    """Of one layer and one microbatch."""
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    tokens = workload.tokens
    if workload.fused_attention:
        scores = _FP32 * tokens * shape.num_attention_heads / tp
    else:
        # The softmax; with dropout its mask (a byte) and what is left of it (Korthikanti et al., 5 a s^2 b).
        dropped = size + 1 if workload.code.attention_dropout else 0
        scores = (size + dropped) * score_count(workload)
    if shape.multi_latent_attention:
        return _latent_attention(workload, scores)
    out = size * tokens * shape.attended_size / tp
    mixed = shape.query_size + shape.key_size + shape.value_size
    rope = shape.position_embedding_type == "rope"
    grouped = shape.num_query_groups < shape.num_attention_heads
    ours = workload.code.backend == "native" and rope and not shape.qk_layernorm
    if ours and shape.num_query_groups >= tp:
        # ``_SplitAndRotate`` writes all three anew and lets go of the projection.
        if grouped and size == _FP32 and workload.batch.micro_batch_size > 1:
            out *= (
                2  # In fp32 groups are a batch (``attend_groups_as_batch``): what comes out is sorted back.
            )
        return AttentionKept(size * tokens * mixed / tp, out, scores)
    if shape.num_query_groups >= tp:
        query, key, projected = shape.query_size / tp, shape.key_size / tp, mixed / tp
    else:
        # Megatron gathers the projections of all ranks; a slice of the whole is the rank's group.
        query, key, projected = shape.query_size / tp, shape.head_size, mixed
    # The values are a view of the projection, which therefore stays whole beside rotated queries and keys.
    kept = size * tokens * (projected + (query + key if rope else 0))
    if rope and workload.code.backend == "native":
        # Cosines and sines, of the queries and of the keys, made anew in each layer.
        kept += 4 * size * workload.shape.seq_length / workload.topology.cp * shape.head_size
    if grouped and (shape.qk_layernorm or not rope):
        kept += size * tokens * query  # Queries of a group lie apart in the projection: a copy.
    if shape.qk_layernorm:
        kept += _FP32 * tokens * (query + key) / shape.head_size
    return AttentionKept(kept, out, scores)


def score_count(workload: Workload) -> float:
    """Scores of one layer and one microbatch on a rank: heads times queries times keys."""
    heads = workload.shape.num_attention_heads / workload.topology.tp
    return heads * workload.tokens * workload.shape.seq_length


def padded_value_size(workload: Workload) -> float:
    """Channels of all values as the kernel takes them: torch's flash kernels know heads of one size only."""
    shape = workload.shape
    if shape.multi_latent_attention and workload.code.backend == "native" and workload.fused_attention:
        return shape.num_attention_heads * max(shape.head_size, shape.v_head_dim)
    return shape.value_size


def _latent_attention(workload: Workload, scores: float) -> AttentionKept:
    shape, topology, size = workload.shape, workload.topology, workload.precision.parameter
    tokens, tp, cut = workload.tokens, topology.tp, workload.sequence_cut
    padded = padded_value_size(workload)
    query = max(shape.query_size, padded) if padded > shape.value_size else shape.query_size
    # Up-projections and rotations are written anew; the output of padded values once as it is and once cut.
    kept = size * tokens * (2 * query + padded + (padded if padded > shape.value_size else 0)) / tp
    of_queries, of_keys_values = shape.latent_sizes
    rotated = shape.qk_pos_emb_head_dim
    # Latents are gathered whole over tp; under sequence parallelism their norms see a slice of that.
    kept += size * tokens * (of_queries + of_keys_values + rotated)
    if shape.qk_layernorm:
        kept += size * tokens * (of_queries + of_keys_values) / cut
    kept += 4 * size * shape.seq_length / topology.cp * rotated
    return AttentionKept(kept, size * tokens * shape.attended_size / tp, scores)


def mlp_kept(workload: Workload, ffn: float, tokens: float) -> float:
    """Before and after the activation function, of a dense MLP of that hidden size (already cut over tp)."""
    shape = workload.shape
    gates = 2 if shape.swiglu else 1
    parts = gates + 1
    if workload.code.device == "cpu" and shape.swiglu:
        parts += (
            1  # ``layers/swiglu.py`` keeps the SiLU of the gate; on CUDA Megatron's fused one is compiled.
        )
    return workload.precision.parameter * tokens * ffn * parts


def expert_tokens(workload: Workload) -> ExpertTokens:
    """Copies of tokens in one layer of experts."""
    topology, shape = workload.topology, workload.shape
    sent = workload.tokens / workload.sequence_cut * shape.moe_router_topk
    seen = sent * topology.etp
    local = (shape.num_experts or 1) / topology.ep
    return ExpertTokens(sent, seen, seen if workload.code.grouped_experts else seen / local)


def experts_kept(workload: Workload) -> dict[str, float]:
    """Bytes of a layer of experts: ``router``, ``experts``, ``expert_activation`` and ``shared_experts``.

    What experts give is not kept: since Megatron 0.12 probabilities are multiplied in before the second
    projection, and neither sorting back nor adding up needs its input (``moe_utils.unpermute``).
    """
    shape, topology, size = workload.shape, workload.topology, workload.precision.parameter
    copies = expert_tokens(workload)
    gates, ffn = 2 if shape.swiglu else 1, shape.expert_ffn_size / topology.etp
    fused = workload.code.device == "cuda" and (shape.swiglu or shape.add_bias_linear)
    before = gates + (0 if fused else 1 + shape.swiglu)
    tokens = workload.tokens / workload.sequence_cut
    shared = shape.moe_shared_expert_intermediate_size or 0
    return {
        "router": _ROUTER * tokens * (shape.num_experts or 0) + _INDEX * copies.sent,
        "experts": size * copies.seen * (shape.hidden_size + before * ffn),
        "expert_activation": size * copies.seen * ffn,
        "shared_experts": mlp_kept(workload, shared / topology.tp, workload.tokens),
    }
