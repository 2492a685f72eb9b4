"""Seconds of one layer for one microbatch, forward and backward: kernels, and what tp, cp and ep must send.

A pass is never shorter than the CPU needs to start its kernels. What waits for communication adds to what the
GPU computes. Nothing here depends on pp, dp or the number of microbatches: a search may keep what it got for
(micro-batch, tp, cp, ep, etp, recompute).

Volumes: Korthikanti et al. 2022 (tp with sequence parallelism: a gather and a scatter for each of attention
and MLP and pass, and a gather more in backward; without it an all-reduce each); Megatron-core
``token_dispatcher.py`` (ep: tokens there and back); Transformer Engine's ring (cp: keys and values of all
other ranks pass by, beside attention); ours sends each rank what it needs of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.numbers import least, most, where
from megaplug.plan.step_time.collectives import exchange_seconds, group_bandwidth, ring_seconds
from megaplug.plan.step_time.kernels import (
    Work,
    attention_core,
    elements,
    expert_activation,
    experts,
    from_latents,
    into_attention,
    into_mlp,
    mlp,
    projections,
)
from megaplug.plan.step_time.rates import Rates
from megaplug.plan.step_time.terms import Number, Terms

#: Sharpness of the maximum of what the GPU and what the CPU needs.
SHARPNESS = 4
#: Of the exchange of tokens with experts, what another microbatch's kernels hide: they share the GPU's cores.
BESIDE_ANOTHER = 0.5


@dataclass(frozen=True)
class PassSeconds:
    """One pass of a layer: computing, and the communication that it waits for."""

    compute: Number
    tp: Number
    cp: Number
    ep: Number

    @property
    def total(self) -> Number:
        """All of it."""
        return self.compute + self.tp + self.cp + self.ep


@dataclass(frozen=True)
class LayerSeconds:
    """A layer for one microbatch; ``backward`` has what is computed again."""

    forward: PassSeconds
    backward: PassSeconds


def layer_seconds(terms: Terms, rates: Rates, *, moe: bool) -> LayerSeconds:
    """One layer for one microbatch.

    Args:
        terms: The workload's numbers; arrays for many workloads at once.
        rates: What the machines reach.
        moe: Whether the layer has experts in place of its MLP.
    """
    core = attention_core(terms, rates)
    block = experts(terms, rates) if moe else mlp(terms, rates)
    moving = elements(terms, rates)
    work = projections(terms, rates) + core + block + moving
    again_block = terms.again_moe if moe else terms.again_mlp
    again = least(
        work.forward,
        terms.again_layer * work.forward
        + (1 - terms.again_layer)
        * (
            terms.again_core * core.forward
            + again_block * block.forward
            + terms.again_elements * moving.forward
            + terms.again_latent * (terms.latent_key > 0) * from_latents(terms, rates).forward
            + (terms.again_activation * expert_activation(terms, rates) if moe else 0.0)
        ),
    )
    tp, tp_again = _tensor_parallel(terms, rates, moe=moe), terms.again_layer
    tp_back = _tensor_parallel_backward(terms, rates, moe=moe)
    ring, ring_back = _context_parallel(terms, rates, core)
    exchange = _expert_parallel(terms, rates) if moe else 0.0
    ep_again = most(terms.again_layer, terms.again_moe) if moe else 0.0
    floor, waits = rates.constants.launch_seconds, 0.0
    if moe:
        local = terms.experts / terms.ep
        waits = rates.constants.moe_launch_seconds + local * rates.constants.expert_seconds
        exchange = exchange * (1 - terms.overlap_ep * BESIDE_ANOTHER)
    return LayerSeconds(
        _pass(floor, work.forward + waits, tp, ring, exchange),
        _pass(
            floor * (1 + terms.again_layer),
            work.backward + again + waits * (1 + terms.again_layer),
            tp_back + tp_again * tp,
            ring_back + terms.again_layer * ring,
            exchange * (1 + ep_again),
        ),
    )


def _pass(floor: Number, compute: Number, tp: Number, cp: Number, ep: Number) -> PassSeconds:
    """Splits a pass that is as long as the GPU or the CPU needs: each part is what it adds."""
    ends = [
        _longer(floor, done) for done in (compute, compute + tp, compute + tp + cp, compute + tp + cp + ep)
    ]
    return PassSeconds(ends[0], ends[1] - ends[0], ends[2] - ends[1], ends[3] - ends[2])


def _longer(left: Number, right: Number) -> Number:
    return (left**SHARPNESS + right**SHARPNESS) ** (1 / SHARPNESS)


def _tensor_parallel(terms: Terms, rates: Rates, *, moe: bool) -> Number:
    """A gather and a scatter a block in forward, which also is what an all-reduce takes."""
    return 2 * _blocks(terms, moe) * _ring(terms, rates) * _beside_userbuffers(terms, rates)


def _tensor_parallel_backward(terms: Terms, rates: Rates, *, moe: bool) -> Number:
    """The same in backward, most of it beside products (Korthikanti et al. 2022, 4.2.2; Megatron and TE).

    The linear layer that goes into a block scatters its input's gradient (without sequence parallelism:
    all-reduces it) beside the product for its weights' gradient. With sequence parallelism it also gathers
    its input once more, beside the product before; and the layer that leads out of the block has to gather
    the gradient that comes to it before anything can be computed.
    """
    rings, sequence = _blocks(terms, moe) * _ring(terms, rates), terms.cut > 1
    products = into_attention(terms, rates).backward
    if not moe:
        products = products + into_mlp(terms, rates).backward
    window = terms.overlap_tp_backward * rates.constants.overlap
    beside = window * products * where(sequence, 1, 0.5)
    before = where(sequence, rings, 0.0) * _beside_userbuffers(terms, rates)
    return before + most((1 - window) * 2 * rings, 2 * rings - beside)


def _ring(terms: Terms, rates: Rates) -> Number:
    """A gather or a scatter of the residual stream."""
    return ring_seconds(terms.activation_bytes * terms.tokens * terms.hidden, terms.tp, 1, rates)


def _blocks(terms: Terms, moe: bool) -> Number:
    """Blocks of a layer that tp cuts: attention, and the MLP. Routed experts have etp, and tokens sent."""
    return 1 + (least(terms.shared_ffn, 1) if moe else 1)


def _beside_userbuffers(terms: Terms, rates: Rates) -> Number:
    """Userbuffers pipeline a ring with the product it feeds; the first and last chunk stay visible."""
    return 1 - terms.overlap_tp * rates.constants.overlap


def _context_parallel(terms: Terms, rates: Rates, core: Work) -> tuple[Number, Number]:
    """What keys and values of other ranks take longer than attention, forward and backward.

    Backward they come once more, and gradients of as many go back.
    """
    kv = terms.activation_bytes * terms.tokens * (terms.key + terms.value) / terms.tp
    moved = kv * terms.received / group_bandwidth(terms.cp, terms.tp, rates)
    ring = where(terms.received > 0, rates.constants.collective_seconds + moved, 0.0)
    visible = 1 - rates.constants.overlap

    def exposed(sent: Number, beside: Number) -> Number:
        return most(visible * sent, sent - beside)

    return exposed(ring, core.forward), exposed(2 * ring, core.backward)


def _expert_parallel(terms: Terms, rates: Rates) -> Number:
    """Tokens to their experts and back; with etp a gather and a scatter of them inside its group."""
    tokens = terms.activation_bytes * terms.tokens / terms.cut * terms.hidden
    there = exchange_seconds(tokens, terms.topk, terms.ep, terms.etp, rates, terms.once)
    spread = ring_seconds(tokens * terms.topk * terms.etp, terms.etp, 1, rates)
    ranks = terms.ep * terms.etp
    # The allgather dispatcher gives every rank all tokens, and scatters the sums of their results.
    gathered = ring_seconds(tokens * ranks, ranks, 1, rates)
    return 2 * where(terms.gathers, gathered, there + spread)
