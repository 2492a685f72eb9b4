"""What a layer, the embedding and the loss need for a moment, beside all that is kept: modelled, in bytes.

A layer's peaks come while its MLP runs: forward when its output is summed up over tensor-parallel ranks,
backward in one of its three steps (second projection, activation function, first projection). Each is written
down as what is there then, less what the steps before it have let go of. The letters are those of
``layer_memory.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.layer_memory import (
    attention_kept,
    expert_tokens,
    experts_kept,
    mlp_kept,
    padded_value_size,
    score_count,
)
from megaplug.plan.numbers import least, most
from megaplug.plan.workload import Workload

_FP32 = 4
# Elements of the logits that our loss works on at a time on CUDA and on a CPU, and fp32 copies of such a
# piece: torch's ``logsumexp`` makes another one. See ``layers/cross_entropy.py``.
_LOSS_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 19}
_LOSS_COPIES = {2: 2, 4: 1}  # by bytes of a logit: fp32 logits are taken as they are


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer and one microbatch.

    Attributes:
        input: Its input, all that full recompute keeps of it.
        kept: What is kept from forward to backward.
        again: What selective recompute makes anew while the layer's backward pass runs.
        forward: Beyond what is kept, at the peak of its forward pass.
        backward: Likewise of its backward pass, beyond ``kept + again``.
    """

    input: float
    kept: float
    again: float
    forward: float
    backward: float

    @property
    def whole(self) -> float:
        """All that its backward pass needs."""
        return self.kept + self.again


def layer_memory(workload: Workload, *, has_experts: bool) -> LayerMemory:
    """One layer's bytes."""
    shape, code, size = workload.shape, workload.code, workload.precision.parameter
    local = workload.tokens / workload.sequence_cut
    stream = size * local * shape.hidden_size
    attention = attention_kept(workload)
    statistics = 2 * _FP32 * local * (2 if shape.normalization == "LayerNorm" else 1)
    masks = 2 * local * shape.hidden_size if code.hidden_dropout else 0
    kept = 4 * stream + attention.total + statistics + masks
    modules = workload.recompute.modules if workload.recompute.granularity == "selective" else ()
    again = 2 * stream if "layernorm" in modules else 0.0
    if "core_attn" in modules:
        again += attention.scores
    if "mla_up_proj" in modules and shape.multi_latent_attention:
        heads = 2 * shape.query_size + padded_value_size(workload)
        again += size * workload.tokens * heads / workload.topology.tp
    # The gradient of the stream, and what comes out of a module that is computed again.
    backward = stream
    if has_experts:
        parts = experts_kept(workload)
        mlp = sum(parts.values())
        if "moe" in modules:
            again, backward = again + mlp, backward + stream
        else:
            again += parts["expert_activation"] if "moe_act" in modules else 0
            again += parts["shared_experts"] if "shared_experts" in modules else 0
        forward = _experts_forward(workload, stream)
        backward += _experts_backward(workload)
        if "moe" in modules:
            backward = most(backward, stream + forward)
    else:
        mlp = mlp_kept(workload, shape.ffn_hidden_size / workload.topology.tp, workload.tokens)
        if "mlp" in modules:
            again, backward = again + mlp, backward + stream
        forward = stream + size * workload.tokens * shape.hidden_size
        backward += _mlp_backward(workload, stream)
    backward = most(backward, _attention_backward(workload, stream) - mlp - 2 * stream)
    return LayerMemory(stream, kept + mlp - again, again, forward, backward)


def _mlp_backward(workload: Workload, stream: float) -> float:
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    whole = size * workload.tokens * shape.hidden_size
    gathered = whole * (workload.sequence_cut > 1)
    sliced = stream * (workload.sequence_cut > 1)
    between, weights = _two_sizes(workload, shape.ffn_hidden_size / tp, workload.tokens)
    return _most_of_steps(workload, between, weights, gathered, whole + sliced)


def _most_of_steps(workload: Workload, between: float, weights: float, before: float, after: float) -> float:
    """The fullest of an MLP's three steps backward.

    Args:
        workload: The job.
        between: Bytes after the activation function; before it there are ``g`` times as many.
        weights: Bytes of the second projection's gradient; the first has ``g`` times as many.
        before: The output's gradient where it is gathered.
        after: The input's gradient, whole and as it is passed on.
    """
    gates = 2 if workload.shape.swiglu else 1
    second = before + between + weights
    # Both gradients; what the second projection kept is gone.
    activation = gates * between
    first = after + gates * weights - between
    return most(second, most(activation, first))


def _two_sizes(workload: Workload, ffn: float, tokens: float) -> tuple[float, float]:
    size = workload.precision.parameter
    return size * tokens * ffn, size * ffn * workload.shape.hidden_size


def _experts_forward(workload: Workload, stream: float) -> float:
    """Names in ``MoELayer.forward`` that still hold the steps before, as the last of them runs."""
    topology, size = workload.topology, workload.precision.parameter
    copies, hidden = expert_tokens(workload), workload.shape.hidden_size
    sorted_copy = (workload.shape.num_experts or 1) > topology.ep
    held = copies.sent * (1 + (topology.ep > 1)) + copies.seen * (1 + sorted_copy)
    needed = size * held * hidden
    # The sum over expert tensor parallelism is in the router's fp32.
    needed += _FP32 * (copies.seen + copies.sent) * hidden * (topology.etp > 1)
    return needed + (stream if workload.shape.moe_shared_expert_intermediate_size else 0)


def _experts_backward(workload: Workload) -> float:
    topology, size = workload.topology, workload.precision.parameter
    shape, copies = workload.shape, expert_tokens(workload)
    sent, seen = size * copies.sent * shape.hidden_size, size * copies.seen * shape.hidden_size
    combine = sent * (1 + (topology.ep > 1))
    summed = (topology.etp > 1) * _FP32 / size * (sent + seen)
    between, weights = _two_sizes(workload, shape.expert_ffn_size / topology.etp, copies.of_one)
    if workload.code.grouped_experts:
        weights *= (shape.num_experts or 1) / topology.ep
    inputs = size * copies.of_one * shape.hidden_size
    mlp = seen + _most_of_steps(workload, between, weights, 0.0, inputs)
    gates = 2 if shape.swiglu else 1
    # All experts are done, and the gradients of their inputs become one again.
    joined = 2 * seen - size * copies.seen * shape.expert_ffn_size / topology.etp * (gates + 1)
    return most(most(combine, summed), most(mlp, joined))


def _attention_backward(workload: Workload, stream: float) -> float:
    """Gradients around the core attention, which sums those of queries in fp32."""
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    heads = shape.query_size + shape.key_size + padded_value_size(workload)
    needed = 2 * stream + size * workload.tokens * (shape.attended_size + heads) / tp
    if workload.fused_attention:
        return needed + _FP32 * workload.tokens * shape.query_size / tp
    return needed + 2 * size * score_count(workload)


def loss_memory(workload: Workload) -> tuple[float, float]:
    """Bytes of the logits that are there for the loss, and of what its two passes need beside them.

    Ours keeps the logits, which become their own gradient, and works in fp32 on pieces of them. Megatron's
    keeps the softmax in fp32; the logits themselves are there in its forward pass, their gradient in its
    backward pass (``vocab_parallel_cross_entropy``).
    """
    code, size, tp = workload.code, workload.precision.parameter, workload.topology.tp
    words = workload.shape.padded_vocab_size(tp) / tp
    count = words * workload.tokens
    hidden = size * workload.tokens * workload.shape.hidden_size
    # The gradients of the output layer: of its weight, and of its input before and after it is cut.
    output = size * words * workload.shape.hidden_size + hidden * (1 + (workload.sequence_cut > 1))
    if code.fused_loss:
        piece = least(count, _LOSS_ELEMENTS[code.device])
        return size * count, most(_LOSS_COPIES[size] * _FP32 * piece, output)
    logits = (size + _FP32) * count if size < _FP32 else size * count
    return logits, most(0, output - (logits - size * count))


def embedding_gradient(workload: Workload) -> float:
    """The gradient of the word embedding, and of what comes out of it: as it came, and gathered or copied."""
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    whole = size * workload.tokens * shape.hidden_size
    return size * shape.padded_vocab_size(tp) / tp * shape.hidden_size + whole * (
        1 + 1 / workload.sequence_cut
    )


def optimizer_step(workload: Workload, *, is_end: bool) -> float:
    """A copy of the largest gradient, as it is scaled (``multi_tensor_scale`` without Apex's or TE's).

    Args:
        workload: The job.
        is_end: Whether the rank holds word embeddings.
    """
    shape, topology = workload.shape, workload.topology
    gates = 2 if shape.swiglu else 1
    largest = gates * shape.ffn_hidden_size / topology.tp
    if is_end:
        largest = most(largest, shape.padded_vocab_size(topology.tp) / topology.tp)
    # The distributed optimizer cuts each gradient wherever a rank's part of all ends.
    parts = topology.dp * topology.cp if workload.sharing.zero else 1
    return _FP32 * largest * shape.hidden_size / parts if workload.code.backend == "native" else 0.0


def standing_buffers(workload: Workload) -> float:
    """Buffers that stay once they are made (``GlobalMemoryBuffer``): gathered inputs, or unfused scores."""
    size, shape = workload.precision.parameter, workload.shape
    gathered = size * workload.tokens * shape.hidden_size * (workload.sequence_cut > 1)
    if workload.fused_attention:
        return gathered
    return most(gathered, size * score_count(workload))
