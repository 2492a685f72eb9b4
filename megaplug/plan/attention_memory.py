"""What attention keeps of one microbatch for its backward pass, and needs for a moment: bytes, modelled.

With T tokens of a microbatch on a rank, e bytes a number and t = tp: queries, keys and values are
``T (q + 2 k) e / t``, what comes out is ``T q e / t``. Whether they are tensors of their own, or views that
keep the whole projection, depends on the code that splits it; what keeps what was counted in the modules
themselves (``benchmarks/rehearse_random.py --only N --origins 40``).
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.layers.registry.sequence_cost import SequenceCost
from megaplug.plan.joint_memory import joint_moments
from megaplug.plan.numbers import most, where
from megaplug.plan.workload import Workload

_FP32 = 4


@dataclass(frozen=True)
class AttentionMemory:
    """Bytes of attention, between the norm before it and the one after it.

    Attributes:
        projected: Queries, keys and values as they go into the core attention, and what stays beside them.
        out: What comes out of it: the input of the output projection.
        scores: What the core attention keeps beside both: softmax, dropout and copies of keys and values of
            unfused attention, or the logarithms that flash attention keeps, and what comes out where the
            output projection takes a copy of it; what is filled up for the kernel, where that is made anew.
        forward: Beyond all of these, as the core attention runs.
        backward: Beyond all of these, at the fullest moment of its backward pass.
    """

    projected: float
    out: float
    scores: float
    forward: float
    backward: float

    @property
    def kept(self) -> float:
        """From forward to backward."""
        return self.projected + self.out + self.scores


def attention_memory(workload: Workload) -> AttentionMemory:
    """Of one layer and one microbatch."""
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    expands = _expands(workload) and not _computes_core_again(workload)
    projected = _latent(workload) if shape.multi_latent_attention else _projected(workload, expands=expands)
    out = size * workload.tokens * shape.attended_size / tp
    if workload.fused_attention:
        scores = _FP32 * workload.tokens * shape.num_attention_heads / tp
        query, padded = kernel_sizes(workload)
        if padded > shape.value_size:
            scores += size * workload.tokens * padded / tp  # what comes out, before it is cut
        if _computes_core_again(workload):
            scores += size * workload.tokens * _filled_up(workload) / tp
        if _sorts_back(workload) and not _joint(workload):
            scores += out  # as it is, and as the output projection takes it
        forward, backward = 0.0, _inside_backward(workload)
        heads = query + (query if shape.multi_latent_attention else shape.key_size) + padded
        backward += size * workload.tokens * (shape.attended_size + heads) / tp
        for cost in _joint(workload):
            moments = joint_moments(workload, cost, _sums_inside(workload))
            forward, backward = most(forward, moments[0]), most(backward, moments[1])
    else:
        scores, forward, backward = _unfused(workload)
        # What comes out is not there yet, or no longer; of the gradients that of the values alone is.
        forward -= out
        backward += (
            size * workload.tokens * (shape.query_size if _expands(workload) else shape.value_size) / tp - out
        )
        if expands and not shape.multi_latent_attention:
            # Keys and values that were repeated are still named by those who called.
            forward += _projected(workload, expands=False) - projected
    if shape.sub_layer_norm:
        # Its input beside what comes out of it, a mean and a deviation of each token.
        scores += out + 2 * _FP32 * workload.tokens
    return AttentionMemory(projected, out, scores, forward, backward)


def _joint(workload: Workload) -> list[SequenceCost]:
    attention = workload.core_attention
    return attention.joint(workload.shape, workload.topology) if attention else []


def _inside_backward(workload: Workload) -> float:
    """What a fused kernel's backward pass needs for itself."""
    return sum(_sums_inside(workload))


def _sums_inside(workload: Workload) -> tuple[float, float]:
    """By rows of queries, and of keys (``runtime/rehearsal/inside.py`` says where).

    It sums gradients of queries in fp32, rows and channels filled up to whole blocks, and one number of each
    row; where groups of heads share keys, it makes gradients of keys and values for every head and then sums
    them up. In fp32 torch has its efficient kernel alone: we hand it groups as a batch, which it does not
    know.
    """
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    is_efficient = workload.code.backend == "native" and size == _FP32
    channels = shape.head_size
    if shape.multi_latent_attention:
        channels = max(channels, shape.v_head_dim)
    block = 64 if is_efficient or channels > 128 else 32
    length = shape.seq_length / workload.topology.cp
    rows = workload.tokens / length * _filled(length, 64 if is_efficient else 128)
    heads = shape.num_attention_heads / tp
    sums = _FP32 * rows * heads * (_filled(channels, block) + 1)
    if shape.multi_latent_attention or is_efficient:
        return sums, 0.0
    shares = heads > most(shape.num_query_groups / tp, 1)
    return sums, where(shares, 2 * size * workload.tokens * heads * shape.head_size, 0)


def _filled(number: float, block: int) -> float:
    return -(-number // block) * block


def score_count(workload: Workload) -> float:
    """Scores of one layer and one microbatch on a rank: heads times queries times keys."""
    heads = workload.shape.num_attention_heads / workload.topology.tp
    return heads * workload.tokens * workload.shape.seq_length


def kernel_sizes(workload: Workload) -> tuple[int, int]:
    """Channels of all queries, and of all values, as the kernel takes them.

    torch's flash kernels know heads of one size only: the shorter ones are filled up, which is a copy.
    """
    shape = workload.shape
    if shape.multi_latent_attention and workload.code.backend == "native" and workload.fused_attention:
        size = shape.num_attention_heads * max(shape.head_size, shape.v_head_dim)
        return size, size
    return shape.query_size, shape.value_size


def latent_again(workload: Workload) -> float:
    """What ``mla_up_proj`` recompute makes anew: queries, keys and values, but for kept copies of them."""
    channels = _kept_channels(workload)
    if not _computes_core_again(workload):
        channels -= _filled_up(workload)
    return workload.precision.parameter * workload.tokens * channels / workload.topology.tp


def _kept_channels(workload: Workload) -> int:
    """Of queries, keys and values: as they are where the core attention runs again, else as it takes them."""
    shape = workload.shape
    query, value = kernel_sizes(workload)
    if _computes_core_again(workload):
        query, value = shape.query_size, shape.value_size
    return 2 * query + value


def _filled_up(workload: Workload) -> int:
    """Channels of queries, keys and values of which the kernel takes a copy."""
    shape = workload.shape
    query, value = kernel_sizes(workload)
    return 2 * query * (query > shape.query_size) + value * (value > shape.value_size)


def rotary_tables(workload: Workload, num_chunks: int) -> float:
    """Angles, cosines and sines that stay: each virtual stage has its own model and so its own.

    ``RotaryEmbedding`` caches fp32 angles. Ours (``layers/attention/rotary.py``) keeps cosines and sines of
    them, and signed sines for forward and backward; Megatron's makes cosines and sines anew in each layer.
    """
    shape, size = workload.shape, workload.precision.parameter
    if not _is_rotary(workload):
        return 0.0
    rotated = shape.qk_pos_emb_head_dim if shape.multi_latent_attention else shape.head_size
    elements = shape.seq_length / workload.topology.cp * rotated * shape.rotary_percent
    # ``lru_cache(maxsize=2)`` keeps signed sines of two models, forward and backward.
    ours = size * (2 * num_chunks + 2 * min(num_chunks, 2)) if _is_ours(workload) else 0
    return elements * (_FP32 * num_chunks + ours)


def _is_rotary(workload: Workload) -> bool:
    return workload.shape.position_embedding_type in ("rope", "yarn") or workload.shape.multi_latent_attention


def _is_ours(workload: Workload) -> bool:
    """Whether ``_SplitAndRotate`` writes queries, keys and values anew and lets go of the projection."""
    shape = workload.shape
    return (
        workload.code.backend == "native"
        and _is_rotary(workload)
        and not shape.multi_latent_attention
        and not shape.qk_layernorm
        and bool(shape.num_query_groups >= workload.topology.tp)
    )


def _is_grouped(workload: Workload) -> bool:
    return workload.shape.num_query_groups < workload.shape.num_attention_heads


def _expands(workload: Workload) -> bool:
    """Whether Megatron's unfused attention repeats keys and values, so that the originals are let go of."""
    return not workload.fused_attention and _is_grouped(workload) and workload.code.backend == "native"


def _computes_core_again(workload: Workload) -> bool:
    return workload.recompute.granularity == "selective" and "core_attn" in workload.recompute.modules


def _sorts_back(workload: Workload) -> bool:
    """In fp32 several groups are a batch (``attend_groups_as_batch``): what comes out is sorted back."""
    groups = workload.shape.num_query_groups / workload.topology.tp
    return (
        workload.code.backend == "native"
        and workload.precision.parameter == _FP32
        and _is_grouped(workload)
        and bool(groups > 1)
        and not workload.shape.multi_latent_attention
    )


def _projected(workload: Workload, *, expands: bool) -> float:
    """Of grouped-query attention; repeated keys and values let go of the originals."""
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    tokens = workload.tokens
    mixed = shape.query_size + shape.key_size + shape.value_size
    is_rotary, is_grouped = _is_rotary(workload), _is_grouped(workload)
    if _is_ours(workload):
        return size * tokens * (shape.query_size if expands else mixed) / tp
    is_whole = bool(shape.num_query_groups < tp)
    query = shape.query_size / tp
    key = shape.head_size if is_whole else shape.key_size / tp
    # Megatron gathers the projections of all ranks; a slice of the whole is the rank's group.
    projection = mixed if is_whole else mixed / tp
    # Queries of several groups, or of several sequences for Megatron's own attention, lie apart: a copy.
    is_copied = bool(shape.num_query_groups > tp) or (
        not workload.fused_attention and bool(workload.batch.micro_batch_size > 1)
    )
    copied = query if is_grouped and is_copied else 0.0
    normed = shape.qk_layernorm
    kept = 0.0
    if normed:
        # Their inputs are kept, with the whole projection, and one or two numbers of each head.
        numbers = 2 if shape.normalization == "LayerNorm" else 1
        kept += size * (projection + copied) + numbers * _FP32 * (query + key) / shape.head_size
    elif not expands or (not is_rotary and not copied):
        # The values, and whatever is not written anew, are views of the projection.
        kept += size * (projection + (0.0 if is_rotary else copied))
    elif not is_rotary:
        kept += size * copied
    if is_rotary or normed:
        kept += size * (query + (0.0 if expands else key))
    if is_rotary and workload.code.backend == "native":
        # Cosines and sines, of the queries and of the keys, made anew in each layer.
        rotated = shape.head_size * shape.rotary_percent
        tables = 4 * size * shape.seq_length / workload.topology.cp * rotated
    else:
        tables = 0.0
    return tokens * kept + tables


def _unfused(workload: Workload) -> tuple[float, float, float]:
    """What Megatron's own attention keeps, and needs beyond it forward and backward.

    The softmax is in fp32 where the scores are narrower, unless a kernel of Apex's or TE's does it all; with
    dropout its mask (a byte) and what is left of it are kept instead of what goes into the dropout
    (Korthikanti et al. 2022, ``5 a s^2 b``). ``dot_product_attention.py`` and ``fused_softmax.py``.
    """
    shape, code, size = workload.shape, workload.code, workload.precision.parameter
    count = score_count(workload)
    drops = bool(code.attention_dropout)
    if code.fused_softmax:
        return (size + drops * (size + 1)) * count, size * count, 2 * size * count
    widens = size < _FP32 and code.softmax_in_fp32
    if widens:
        kept, forward = _FP32 + size + drops, (5 if drops else 6)
        backward = 5 if drops else 6
    else:
        kept, forward = size + drops * (size + 1), size
        # Scores are masked in place in a view, whose gradient autograd copies (``CopySlices``).
        backward = 4 * size - kept
    mask = shape.seq_length * shape.seq_length
    expanded = 0.0
    if _expands(workload):
        expanded = 2 * size * workload.tokens * shape.query_size / workload.topology.tp
    return kept * count + mask + expanded, forward * count, backward * count


def _latent(workload: Workload) -> float:
    """Of multi-head latent attention."""
    shape, topology, size = workload.shape, workload.topology, workload.precision.parameter
    tokens, tp, cut = workload.tokens, topology.tp, workload.sequence_cut
    # Up-projections and rotations are written anew.
    kept = size * tokens * _kept_channels(workload) / tp
    of_queries, of_keys_values = shape.latent_sizes
    rotated = shape.qk_pos_emb_head_dim
    # Latents are gathered whole over tp; under sequence parallelism their norms see a slice of that.
    kept += size * tokens * (of_queries + of_keys_values + rotated)
    if shape.qk_layernorm:
        kept += size * tokens * (of_queries + of_keys_values) / cut
    return kept + 4 * size * shape.seq_length / topology.cp * rotated
