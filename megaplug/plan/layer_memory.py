"""One layer: what it keeps, what it computes again and what it needs for a moment beside all that is kept.

Modelled, in bytes. A layer's peaks come while its MLP runs: forward when its output is summed up over
tensor-parallel ranks, backward in one of its three steps (second projection, activation function, first
projection), or while unfused attention has its scores. Each is written down as what is there then, less what
the steps before it have let go of. The letters are those of ``mlp_memory.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.attention_memory import AttentionMemory, attention_memory, latent_again
from megaplug.plan.expert_memory import experts_backward, experts_forward, experts_kept
from megaplug.plan.mlp_memory import mlp_kept, mlp_moments, widest_step
from megaplug.plan.numbers import most
from megaplug.plan.workload import Workload

_FP32 = 4


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer and one microbatch.

    Attributes:
        input: Its input, all that full recompute keeps of it.
        kept: What is kept from forward to backward.
        again: What selective recompute makes anew while the layer's backward pass runs.
        forward: Beyond what is kept, at the peak of its forward pass.
        backward: Likewise of its backward pass, with what is made anew.
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
    attention = attention_memory(workload)
    statistics = 2 * _FP32 * local * (2 if shape.normalization == "LayerNorm" else 1)
    masks = 2 * local * shape.hidden_size if code.hidden_dropout else 0
    modules = workload.recompute.modules if workload.recompute.granularity == "selective" else ()
    of_norm = stream if "layernorm" in modules else 0.0
    again = 2 * of_norm
    if "core_attn" in modules:
        again += attention.scores
    if "mla_up_proj" in modules and shape.multi_latent_attention:
        again += latent_again(workload)
    # The dropout's gradient beside that of the stream; its mask is gone by then.
    dropped = stream - masks / 2 if code.hidden_dropout else 0.0
    if has_experts:
        mlp, of_mlp, forward, after = _experts(workload, modules, stream)
        after = after + dropped
    else:
        mlp, of_mlp, forward, after = _dense(workload, modules, stream, dropped)
    # Of what is made anew, attention's part is there only once the MLP's backward pass is done.
    backward = most(of_norm + of_mlp + stream + after, again + of_mlp + attention.backward - mlp)
    forward = most(forward, _attention_forward(attention, modules, stream) - mlp + of_mlp)
    kept = 4 * stream + attention.kept + statistics + masks + mlp - again - of_mlp
    return LayerMemory(stream, kept, again + of_mlp, forward, backward)


def _attention_forward(attention: AttentionMemory, modules: tuple[str, ...], stream: float) -> float:
    """As the core attention runs, when nothing that comes after it is there."""
    again = attention.scores if "core_attn" in modules else 0.0
    return attention.forward + again - 2 * stream


def _dense(
    workload: Workload, modules: tuple[str, ...], stream: float, dropped: float
) -> tuple[float, float, float, float]:
    """An MLP: what it keeps, how much of that is made anew, its peaks forward and backward."""
    shape, tp, size = workload.shape, workload.topology.tp, workload.precision.parameter
    ffn = shape.ffn_hidden_size / tp
    kept = mlp_kept(workload, ffn, workload.tokens)
    whole = size * workload.tokens * shape.hidden_size
    is_cut = workload.sequence_cut > 1
    moments = mlp_moments(workload, ffn, workload.tokens)
    forward = stream + whole
    if "mlp" not in modules:
        # Where it is not gathered, the gradient that comes in is the dropout's.
        before = whole if is_cut else dropped
        return kept, 0.0, forward, widest_step(moments, before=before, after=whole + stream * is_cut)
    # The dropout's gradient is an argument of the checkpoint's backward pass until that is done.
    backward = dropped + widest_step(moments, before=whole * is_cut, after=whole + stream * is_cut)
    # What comes out of it is made anew, too.
    return kept, kept, forward + kept, backward + stream


def _experts(
    workload: Workload, modules: tuple[str, ...], stream: float
) -> tuple[float, float, float, float]:
    """Likewise a layer of experts."""
    parts = experts_kept(workload)
    kept = sum(parts.values())
    forward = most(experts_forward(workload, stream), 2 * stream)
    backward = experts_backward(workload)
    if "moe" in modules:
        return kept, kept, forward + kept, most(backward, forward) + stream
    again = parts["expert_activation"] if "moe_act" in modules else 0.0
    again += parts["shared_experts"] if "shared_experts" in modules else 0.0
    return kept, again, forward, backward
