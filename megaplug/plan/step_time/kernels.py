"""Seconds of the kernels of one layer on one GPU, for one microbatch: products, attention, element-wise ones.

A matrix product takes its FLOPs at the rate of large ones *and* its bytes at the memory's rate: the sum of
the two makes products with a small dimension inefficient, smoothly, without a table of tiles. Element-wise
kernels take their bytes. Backward has every product twice: the gradient of the input and that of the weights,
which is added in place to what earlier microbatches left.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.step_time.rates import Rates
from megaplug.plan.step_time.terms import Number, Terms

#: Fused attention computes the scores again in backward: 5 products where forward has 2.
FUSED_BACKWARD = 2.5
#: A causal mask leaves half of the scores; fused attention leaves the rest out, unfused one does not.
CAUSAL = 0.5


@dataclass(frozen=True)
class Work:
    """Seconds of a part of a layer on one GPU, without recompute."""

    forward: Number
    backward: Number

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)


def product(
    rows: Number, columns: Number, inner: Number, terms: Terms, rates: Rates, copies: Number = 1
) -> Work:
    """A product of (rows, inner) with weights of (inner, columns).

    Args:
        rows: Tokens, of all copies together.
        columns: Outputs.
        inner: What is summed over.
        terms: The workload, for the bytes of operands and gradients.
        rates: What the machines reach.
        copies: Matrices of weights that the rows are shared out to: local experts.
    """
    computing = 2 * rows * columns * inner / rates.products
    weights = copies * columns * inner
    ends = (rows * inner * terms.operand_bytes + rows * columns * terms.activation_bytes) / rates.memory
    read = weights * terms.operand_bytes / rates.memory
    added = weights * 2 * terms.gradient_bytes / rates.memory
    cast = terms.cast_bytes / rates.memory
    return Work(
        computing + ends + read + cast * rows * inner,
        2 * computing + 2 * ends + read + added + cast * rows * columns,
    )


def projections(terms: Terms, rates: Rates) -> Work:
    """The linear layers of attention; with multi-latent attention those down to and up from the latents."""
    tokens, hidden, tp = terms.tokens, terms.hidden, terms.tp
    out = product(tokens, hidden, terms.attended / tp, terms, rates)
    latent = terms.latent_key > 0
    down = product(tokens, (terms.latent_query + terms.latent_key) / tp, hidden, terms, rates)
    into = into_attention(terms, rates)
    return Work(
        out.forward + into.forward + latent * down.forward,
        out.backward + into.backward + latent * down.backward,
    )


def into_attention(terms: Terms, rates: Rates) -> Work:
    """The product for queries, keys and values; with multi-latent attention those up from the latents."""
    latent = terms.latent_key > 0
    columns = (terms.query + terms.key + terms.value) / terms.tp
    plain, up = product(terms.tokens, columns, terms.hidden, terms, rates), from_latents(terms, rates)
    return Work(
        (1 - latent) * plain.forward + latent * up.forward,
        (1 - latent) * plain.backward + latent * up.backward,
    )


def into_mlp(terms: Terms, rates: Rates) -> Work:
    """The first product of the dense MLP."""
    return product(terms.tokens, terms.gates * terms.ffn / terms.tp, terms.hidden, terms, rates)


def from_latents(terms: Terms, rates: Rates) -> Work:
    """The products up from the latents of multi-latent attention; of no meaning without."""
    tokens, tp = terms.tokens, terms.tp
    inner = terms.latent_query + (terms.latent_query == 0) * terms.hidden
    queries = product(tokens, terms.query / tp, inner, terms, rates)
    return queries + product(tokens, (terms.key + terms.value) / tp, terms.latent_key, terms, rates)


def attention_core(terms: Terms, rates: Rates) -> Work:
    """Scores and values: fused, at its own rate; or unfused, with every score going through memory.

    Fused, only pairs of a query and a key that it reads are computed.
    """
    flops = 2 * terms.tokens * terms.seq * (terms.query + terms.attended) / terms.tp
    fused = flops * CAUSAL * terms.pairs / rates.attention
    # Unfused: of the whole square, and the scores of every head pass to and from memory several times.
    scores = terms.activation_bytes * terms.tokens * terms.seq * terms.heads / terms.tp / rates.memory
    moved = rates.constants.score_passes * scores
    unfused = flops / rates.products
    return Work(
        terms.fused * fused + (1 - terms.fused) * (unfused + moved),
        terms.fused * FUSED_BACKWARD * fused + (1 - terms.fused) * (2 * unfused + moved),
    )


def mlp(terms: Terms, rates: Rates) -> Work:
    """The dense MLP and its activation."""
    return _feed_forward(terms.tokens, terms.ffn / terms.tp, terms, rates)


def experts(terms: Terms, rates: Rates) -> Work:
    """Router, routed experts with balanced routing, shared expert."""
    own = terms.tokens / terms.cut
    routed = own * terms.topk * terms.etp
    local = terms.experts / terms.ep
    work = product(own, terms.experts, terms.hidden, terms, rates)
    work += _feed_forward(routed, terms.expert_ffn / terms.etp, terms, rates, copies=local)
    # Tokens are copied into the order of experts and back, and weighed. Biases are added outside of the
    # grouped product, expert by expert and in fp32 (Megatron-core's TEGroupedMLP._apply_bias).
    passes = rates.constants.expert_passes + terms.expert_bias * rates.constants.bias_passes
    copied = passes * terms.activation_bytes * routed * terms.hidden / rates.memory
    work += Work(copied, copied)
    return work + _feed_forward(terms.tokens, terms.shared_ffn / terms.tp, terms, rates)


def expert_activation(terms: Terms, rates: Rates) -> Number:
    """Seconds of the activation between the products of experts, in one forward pass."""
    routed = terms.tokens / terms.cut * terms.topk
    return terms.activation_bytes * routed * terms.expert_ffn * (terms.gates + 1) / rates.memory


def elements(terms: Terms, rates: Rates) -> Work:
    """Norms, residuals, dropout and biases: passes over the residual stream; rotation of queries and keys."""
    stream = terms.activation_bytes * terms.tokens * terms.hidden / terms.cut
    heads = terms.activation_bytes * 2 * terms.tokens * (terms.query + terms.key) / terms.tp
    seconds = (rates.constants.element_passes * stream + heads) / rates.memory
    return Work(seconds, seconds)


def _feed_forward(tokens: Number, ffn: Number, terms: Terms, rates: Rates, copies: Number = 1) -> Work:
    into = product(tokens, terms.gates * ffn, terms.hidden, terms, rates, copies)
    out = product(tokens, terms.hidden, ffn, terms, rates, copies)
    activation = terms.activation_bytes * tokens * ffn * (terms.gates + 1) / rates.memory
    return into + out + Work(activation, 2 * activation)
