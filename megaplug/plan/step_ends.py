"""What loss, embedding and optimizer need for a moment, and buffers that stay: modelled, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from megaplug.plan.attention_memory import rotary_tables, score_count
from megaplug.plan.in_flight import Chunk
from megaplug.plan.numbers import least, most, where
from megaplug.plan.parameters import RankParameters
from megaplug.plan.workload import Workload

_FP32 = 4
_BF16 = 2
# Elements of the logits that our loss works on at a time on CUDA and on a CPU, and fp32 copies of such a
# piece: torch's ``logsumexp`` makes another one. See ``layers/cross_entropy.py``.
_LOSS_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 19}
_LOSS_COPIES = {2: 2, 4: 1}  # by bytes of a logit: fp32 logits are taken as they are
# Gradients are reduced in buckets of at least so many (``DistributedDataParallel.__init__``).
_BUCKET, _BUCKET_OF_RANK = 40_000_000, 1_000_000


def loss_memory(workload: Workload) -> tuple[float, float]:
    """Bytes of the logits that are there for the loss, and of what its two passes need beside them.

    Ours keeps the logits, which become their own gradient, and works in fp32 on pieces of them. Megatron's
    keeps the softmax in fp32; the logits themselves are there in its forward pass, their gradient in its
    backward pass (``vocab_parallel_cross_entropy``). In chunks the logits are those of one chunk.
    """
    if workload.code.loss_chunk is not None:
        return _chunked_loss(workload, workload.code.loss_chunk)
    code, size, tp = workload.code, workload.precision.parameter, workload.topology.tp
    words = workload.shape.padded_vocab_size(tp) / tp
    count = words * workload.tokens
    hidden = size * workload.tokens * workload.shape.hidden_size
    # The gradients of the output layer: of its weight, and of its input before and after it is cut.
    is_cut = workload.sequence_cut > 1
    output = size * words * workload.shape.hidden_size + hidden * (1 + is_cut / workload.sequence_cut)
    if code.fused_loss:
        piece = least(count, _LOSS_ELEMENTS[code.device])
        return size * count, most(_LOSS_COPIES[size] * _FP32 * piece, output)
    logits = (size + _FP32) * count if size < _FP32 else size * count
    # The fused one's gradient is there in bf16 and in the logits' own type at once.
    cast = 0.0
    if code.loss_gradient_in_bf16:
        cast = size * count if size < _FP32 else (_BF16 + size) * count
    return logits, most(cast, output - (logits - size * count))


def _chunked_loss(workload: Workload, chunk: int) -> tuple[float, float]:
    """Of ``layers/chunked_loss.py``: its forward pass, and three moments of its backward pass.

    There the gradient of all hidden states fills up chunk by chunk, and the weight's is summed up in fp32.
    """
    size, tp, hidden_size = workload.precision.parameter, workload.topology.tp, workload.shape.hidden_size
    words = workload.shape.padded_vocab_size(tp) / tp
    count = words * least(workload.tokens, chunk)
    narrow = size < _FP32
    piece = _FP32 * least(count, _LOSS_ELEMENTS[workload.code.device])
    hidden = size * workload.tokens * hidden_size
    total, cast = _FP32 * words * hidden_size, narrow * size * words * hidden_size
    is_cut = workload.tokens > chunk
    in_chunk = hidden + where(is_cut, total, 0) + narrow * piece
    adding = hidden + total * (1 + (narrow and is_cut))
    part = hidden / workload.sequence_cut * (workload.sequence_cut > 1)
    # The last chunk's logits are gone when ranks add up what they have.
    end = most(hidden + part + total, hidden / workload.sequence_cut + total + cast) - size * count
    beside = most(most(_LOSS_COPIES[size] * piece, in_chunk), most(adding, end))
    return size * count, beside


def tied_gradient(workload: Workload) -> float:
    """The output layer's part of a tied embedding's gradient, which waits for the embedding's part.

    Only where one rank has both: autograd adds them up before they reach the main gradient.
    """
    shape, topology = workload.shape, workload.topology
    if topology.pp > 1 or shape.untie_embeddings_and_output_weights:
        return 0.0
    return _word_embedding(workload)


def embedding_gradient(workload: Workload) -> float:
    """The gradient of the word embedding, and of what comes out of it: as it came, and gathered or copied.

    Where it is tied, the sum with the output layer's part comes after those are gone (`tied_gradient` is not
    counted here).
    """
    whole = workload.precision.parameter * workload.tokens * workload.shape.hidden_size
    weight = _word_embedding(workload)
    return weight + most(whole * (1 + 1 / workload.sequence_cut), tied_gradient(workload))


def _word_embedding(workload: Workload) -> float:
    shape, tp = workload.shape, workload.topology.tp
    return workload.precision.parameter * shape.padded_vocab_size(tp) / tp * shape.hidden_size


def optimizer_step(workload: Workload, held: RankParameters, stage: int, chunks: Sequence[Chunk]) -> float:
    """A copy of the largest gradient, as it is scaled (``multi_tensor_scale`` without Apex's or TE's).

    Args:
        workload: The job.
        held: What the rank holds.
        stage: Of the pipeline.
        chunks: Its layers.
    """
    if workload.code.backend != "native":
        return 0.0
    shape, topology = workload.shape, workload.topology
    gates, hidden = 2 if shape.swiglu else 1, shape.hidden_size
    largest = (shape.query_size + shape.key_size + shape.value_size) / topology.tp
    if shape.multi_latent_attention:
        largest = shape.query_size / topology.tp
    if not all(shape.moe_layers):
        largest = most(largest, gates * shape.ffn_hidden_size / topology.tp)
    words = shape.padded_vocab_size(topology.tp) / topology.tp * hidden
    is_tied = not shape.untie_embeddings_and_output_weights
    is_first, is_last = stage == 0, stage == topology.pp - 1
    ends = words * (is_first + (is_last and not (is_first and is_tied)))
    # Each virtual stage has buckets of its own.
    share = max(len(chunk) for chunk in chunks) / max(1, sum(len(chunk) for chunk in chunks))
    ranks, bucket = topology.dp * topology.cp, (held.dense - ends) * share
    dense = _piece(workload, largest * hidden, bucket, ranks)
    if ends:
        # A tied one that two stages have is a bucket of its own (``_does_param_require_new_bucket``).
        is_alone = is_tied and topology.pp > 1
        dense = most(dense, _piece(workload, words, words if is_alone else bucket + words, ranks))
    if not shape.is_moe:
        return _FP32 * dense
    of_expert = gates * shape.expert_ffn_size / topology.etp * hidden
    if workload.code.grouped_experts and workload.code.backend == "native":
        # Ours are one parameter; Transformer Engine's product takes one of each expert.
        of_expert *= (shape.num_experts or 0) / topology.ep
    return _FP32 * most(dense, _piece(workload, of_expert, held.expert * share, topology.expert_dp))


def _piece(workload: Workload, largest: float, bucket: float, ranks: float) -> float:
    """Of the largest gradient, as much as one rank steps: buckets are cut over the data-parallel ranks."""
    if not workload.sharing.zero:
        return largest
    if workload.overlaps.grad_reduce:
        bucket = least(bucket, most(_BUCKET, _BUCKET_OF_RANK * ranks) + largest)
    return least(largest, bucket / ranks)


def standing_buffers(workload: Workload, chunks: Sequence[Chunk]) -> float:
    """Buffers that stay once they are made: gathered inputs or unfused scores, and rotary angles.

    ``GlobalMemoryBuffer`` has one buffer for all that is gathered and for scores, as large as the largest.

    Args:
        workload: The job.
        chunks: The layers of a pipeline stage.
    """
    size, shape, topology = workload.precision.parameter, workload.shape, workload.topology
    gathered = size * workload.tokens * shape.hidden_size * (workload.sequence_cut > 1)
    has_experts = any(kind for chunk in chunks for kind in chunk)
    if has_experts and workload.routing.gathers and topology.ep * topology.etp > 1:
        ranks = topology.ep * topology.etp / workload.sequence_cut
        gathered = most(gathered, size * workload.tokens * shape.hidden_size * ranks)
    if not workload.fused_attention:
        gathered = most(gathered, size * score_count(workload))
    return gathered + rotary_tables(workload, len(chunks))
