"""What a layer of experts keeps of one microbatch, and what it needs for a moment: bytes, modelled.

A rank sends ``topk`` copies of each of its tokens (``sent``); its experts see as many, gathered over expert
tensor parallelism (``seen``), since routing is taken as balanced. Moments are those of Megatron's
``MoELayer`` and its token dispatchers: a name in a function that has not returned keeps what it names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megaplug.plan.mlp_memory import mlp_kept, mlp_moments, widest_step
from megaplug.plan.numbers import most
from megaplug.plan.workload import Workload

_FP32 = 4
_INDEX = 8


@dataclass(frozen=True)
class ExpertTokens:
    """Copies of tokens in one layer of experts, with a balanced router.

    Attributes:
        own: Tokens of the rank.
        sent: Copies that the rank sends: ``topk`` of each of its tokens.
        seen: Copies that its experts compute, gathered over expert tensor parallelism.
        of_one: Copies that go through one matrix product: an expert's, or all if experts are grouped.
        everywhere: Tokens of all ranks that share the experts.
    """

    own: float
    sent: float
    seen: float
    of_one: float
    everywhere: float


def expert_tokens(workload: Workload) -> ExpertTokens:
    """Of one microbatch."""
    topology, shape = workload.topology, workload.shape
    own = workload.tokens / workload.sequence_cut
    sent = own * shape.moe_router_topk
    seen = sent * topology.etp
    local = (shape.num_experts or 1) / topology.ep
    of_one = seen if workload.code.grouped_experts else seen / local
    return ExpertTokens(own, sent, seen, of_one, own * topology.ep * topology.etp)


def experts_kept(workload: Workload) -> dict[str, float]:
    """Bytes of a layer of experts: ``router``, ``experts``, ``expert_activation`` and ``shared_experts``.

    What experts give is not kept: since Megatron 0.12 probabilities are multiplied in before the second
    projection, and neither sorting back nor adding up needs its input (``moe_utils.unpermute``).
    """
    shape, topology, size = workload.shape, workload.topology, workload.precision.parameter
    copies = expert_tokens(workload)
    gates, ffn = 2 if shape.swiglu else 1, shape.expert_ffn_size / topology.etp
    in_cache = _stay_in_cache(workload)
    fused = in_cache or (workload.code.device == "cuda" and (shape.swiglu or shape.add_bias_linear))
    before = gates + (0 if fused else 1 + shape.swiglu)
    shared = shape.moe_shared_expert_intermediate_size or 0
    return {
        "router": _router_kept(workload, copies),
        "experts": size * copies.seen * (shape.hidden_size + before * ffn),
        "expert_activation": 0.0 if in_cache else size * copies.seen * ffn,
        "shared_experts": mlp_kept(workload, shared / topology.tp, workload.tokens),
    }


def _router_kept(workload: Workload, copies: ExpertTokens) -> float:
    """Scores in fp32, probabilities and maps for each token and expert, and the places of the copies."""
    routing = workload.routing
    wide = _FP32 if routing.in_fp32 else workload.precision.parameter
    each = _FP32 + wide + 1 + (_FP32 + 1) * routing.balances + (wide + 1) * routing.drops
    tokens = copies.everywhere if routing.gathers else copies.own
    mask = 1 * tokens * (workload.shape.num_experts or 0)
    return each * copies.own * (workload.shape.num_experts or 0) + mask + (_INDEX + wide) * copies.sent


def experts_forward(workload: Workload, stream: float) -> float:
    """Beyond what is kept, at the fullest moment of the forward pass of a layer of experts."""
    copies, size = expert_tokens(workload), workload.precision.parameter
    hidden = workload.shape.hidden_size
    shared = stream if workload.shape.moe_shared_expert_intermediate_size else 0.0
    seen, sent = size * copies.seen * hidden, size * copies.sent * hidden
    several = _several(workload)
    if workload.routing.gathers:
        return shared + most((1 + several) * seen, _combined_by_all(workload, copies, seen))
    topology = workload.topology
    # ``hidden_states`` and ``dispatched_input`` of ``custom_forward``; one of them is what the experts keep
    # where nothing is sorted or gathered.
    is_gathered = 1 * (topology.etp > 1)
    named = sent * (1 * (topology.ep > 1) + most(several, is_gathered))
    # The sum over expert tensor parallelism is in the type of the router's probabilities.
    wide = _wide(workload)
    summed = (
        (wide * (copies.seen + copies.sent) if wide > size else size * copies.sent) * hidden * is_gathered
    )
    ends = seen * (1 + several) + summed
    added = most(sent * (1 + (topology.ep > 1)), sent + stream * (2 if shared else 1))
    return shared + named + most(ends, added)


def _combined_by_all(workload: Workload, copies: ExpertTokens, seen: float) -> float:
    """The allgather dispatcher adds up all ranks' tokens, then sums them in the type of the probabilities."""
    size, hidden, wide = workload.precision.parameter, workload.shape.hidden_size, _wide(workload)
    every = size * copies.everywhere * hidden
    added = seen + every
    if workload.topology.ep * workload.topology.etp == 1:
        return added
    summed = every + wide * copies.own * hidden
    if wide > size:
        summed += wide * copies.everywhere * hidden
    return most(added, summed)


def experts_backward(workload: Workload) -> float:
    """Beyond what is kept and the gradient of the stream, at the fullest moment of the backward pass."""
    topology, size = workload.topology, workload.precision.parameter
    shape, copies = workload.shape, expert_tokens(workload)
    hidden = shape.hidden_size
    sent, seen = size * copies.sent * hidden, size * copies.seen * hidden
    wide, internals = _wide(workload), _internals(workload, copies)
    is_wide = wide > size
    if workload.routing.gathers:
        every = size * copies.everywhere * hidden
        combine = every + seen
        if topology.ep * topology.etp > 1:
            gathered = wide * (copies.everywhere + copies.own) * hidden
            widened = wide * copies.everywhere * hidden + every
            combine = most(combine, most(gathered, widened) if is_wide else gathered)
        # Places of the copies are added up in zeros of all tokens; what the experts kept is gone.
        spread = seen + every - internals - seen
    else:
        combine = sent * (1 + (topology.ep > 1))
        gathered = wide * (copies.seen + copies.sent) * hidden
        if is_wide:
            gathered = most(gathered, (wide + size) * copies.seen * hidden)
        combine = most(combine, (topology.etp > 1) * gathered)
        spread = 0.0
    several = _several(workload)
    combine = most(combine, 2 * several * seen * (not workload.routing.gathers))
    # All experts are done, and the gradients of their inputs become one again.
    spread = most(spread, several * (2 * seen - internals))
    ffn = shape.expert_ffn_size / topology.etp
    if _stay_in_cache(workload):
        return most(most(combine, spread), _in_cache_backward(workload, copies, ffn))
    moments = mlp_moments(workload, ffn, copies.of_one)
    if workload.code.grouped_experts:
        moments = mlp_moments(workload, ffn, copies.of_one, matrices=(shape.num_experts or 1) / topology.ep)
        if workload.code.backend == "native" and shape.swiglu:
            # ``_WeightedSwiGLU``: the SiLU, and the gradient times probabilities before and after rounding.
            unrounded = wide * copies.of_one * ffn * is_wide
            moments = replace(moments, besides=2 * moments.between + unrounded)
    # Several experts, one after the other, take their parts of one gradient.
    whole = seen * several * (not workload.code.grouped_experts)
    mlp = whole + widest_step(moments, before=seen - whole, after=size * copies.of_one * hidden)
    return most(most(combine, spread), mlp)


def _stay_in_cache(workload: Workload) -> bool:
    """Whether experts are those of ``layers/experts/in_cache.py``, one after the other from end to end."""
    shape, code = workload.shape, workload.code
    is_plain = shape.swiglu and not shape.add_bias_linear
    return code.device == "cpu" and code.backend == "native" and code.grouped_experts and is_plain


def _in_cache_backward(workload: Workload, copies: ExpertTokens, ffn: float) -> float:
    """The gradients that come in, that go out and of all weights, and an expert's own numbers in fp32."""
    shape, size = workload.shape, workload.precision.parameter
    local = (shape.num_experts or 1) / workload.topology.ep
    weights = 3 * local * ffn * shape.hidden_size
    scratch = _FP32 * (copies.seen / local) * (5 * ffn + shape.hidden_size)
    return size * (2 * copies.seen * shape.hidden_size + weights) + scratch


def _internals(workload: Workload, copies: ExpertTokens) -> float:
    """What the experts kept between their two projections."""
    parts = experts_kept(workload)
    size, hidden = workload.precision.parameter, workload.shape.hidden_size
    return parts["experts"] + parts["expert_activation"] - size * copies.seen * hidden


def _several(workload: Workload) -> int:
    """1 where copies are sorted by the rank's own experts, else 0."""
    return 1 * ((workload.shape.num_experts or 1) > workload.topology.ep)


def _wide(workload: Workload) -> int:
    """Bytes of a routing probability."""
    return _FP32 if workload.routing.in_fp32 else workload.precision.parameter
