"""Seconds of all microbatches on a pipeline: the busiest stage, and the wait for the others.

1F1B: a step is every stage once, and the busiest stage ``m - 1`` times more: ``sum + (m - 1) max``. Of that
the wait is ``sum - max``, which v virtual stages divide: (p - 1) / (m v) of the work where all stages are
equal (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.numbers import most, where
from megaplug.plan.step_time.collectives import send_seconds
from megaplug.plan.step_time.layer import LayerSeconds
from megaplug.plan.step_time.rates import Rates
from megaplug.plan.step_time.terms import Number, Terms


@dataclass(frozen=True)
class PipelineSeconds:
    """All microbatches of a step: work of the busiest stage by what it is, the wait, visible transfers."""

    compute: Number
    tp: Number
    cp: Number
    ep: Number
    bubble: Number
    pp: Number
    forward: Number
    backward: Number


def pipeline_seconds(
    terms: Terms, rates: Rates, dense: LayerSeconds, moe: LayerSeconds | None
) -> PipelineSeconds:
    """All microbatches of a step.

    Args:
        terms: The workload's numbers.
        rates: What the machines reach.
        dense: A layer without experts.
        moe: A layer with experts; None if the model has none.

    Returns:
        The seconds; ``forward`` and ``backward`` are those of one microbatch on the busiest stage.
    """
    count, stages = terms.microbatches, terms.pp
    head, embedding = head_seconds(terms, rates), embedding_seconds(terms, rates)
    fixed = rates.constants.microbatch_seconds

    def layers(part: str, which: str, counts: tuple[Number, Number]) -> Number:
        first = counts[0] * getattr(getattr(dense, which), part)
        return first if moe is None else first + counts[1] * getattr(getattr(moe, which), part)

    def stage(counts: tuple[Number, Number]) -> Number:
        return layers("total", "forward", counts) + layers("total", "backward", counts)

    of_stages = {
        "first": (terms.dense_first, terms.moe_first),
        "middle": (terms.dense_middle, terms.moe_middle),
        "last": (terms.dense_last, terms.moe_last),
    }
    times = {
        "first": stage(of_stages["first"]) + where(stages > 1, embedding, 0.0),
        "middle": stage(of_stages["middle"]),
        "last": stage(of_stages["last"]) + head + where(stages > 1, 0.0, embedding),
    }
    busiest = most(most(times["first"], times["middle"]), times["last"])
    all_stages = stage((terms.dense_layers, terms.moe_layers)) + head + embedding
    # A stage that is empty in a short pipeline never is the busiest, and the sum has every layer once.
    wait = (all_stages - busiest + (stages - 1) * fixed) / terms.vpp
    is_last = times["last"] >= busiest
    is_first = (times["first"] >= busiest) > is_last

    def of_busiest(part: str, which: str) -> Number:
        first, middle, last = (layers(part, which, of_stages[name]) for name in ("first", "middle", "last"))
        return where(is_last, last, where(is_first, first, middle))

    def both(part: str) -> Number:
        return count * (of_busiest(part, "forward") + of_busiest(part, "backward"))

    around = where(is_last, head + where(stages > 1, 0.0, embedding), where(is_first, embedding, 0.0))
    return PipelineSeconds(
        compute=both("compute") + count * (around + fixed),
        tp=both("tp"),
        cp=both("cp"),
        ep=both("ep"),
        bubble=wait,
        pp=_transfers(terms, rates),
        forward=of_busiest("total", "forward"),
        backward=of_busiest("total", "backward"),
    )


def head_seconds(terms: Terms, rates: Rates) -> Number:
    """Logits and loss of one microbatch, forward and backward: three products and passes over fp32 logits.

    In chunks it is four products, and each chunk's gradient of the weight is added to an fp32 sum.
    """
    again = where(terms.loss_chunks > 0, 1, 0)
    flops = (6 + 2 * again) * terms.tokens * terms.hidden * terms.vocab / terms.tp
    # bf16 out, fp32 copy, maximum, exponentials and sum, and the gradient on its way back.
    logits = (24 + 2 * terms.activation_bytes * again) * terms.tokens * terms.vocab / terms.tp
    added = 16 * terms.loss_chunks * terms.vocab * terms.hidden / terms.tp
    gather = 2 * terms.activation_bytes * terms.tokens * terms.hidden * (terms.tp - 1) / terms.tp / rates.link
    return flops / rates.head + (logits + added) / rates.memory + gather


def embedding_seconds(terms: Terms, rates: Rates) -> Number:
    """Looking tokens up and adding up their gradients."""
    return 8 * terms.activation_bytes * terms.tokens * terms.hidden / rates.memory


def _transfers(terms: Terms, rates: Rates) -> Number:
    """Activations and gradients between stages that nothing hides.

    A rank exchanges both ways twice for each microbatch and virtual stage. Interleaving can run them beside
    computing; filling and emptying the pipeline stays visible.
    """
    # Without sequence parallelism, too, each rank of a tp group sends its part (Narayanan et al. 2021, 4.1).
    sent = terms.activation_bytes * terms.tokens * terms.hidden / terms.tp
    once = send_seconds(sent, terms.pp, terms.tp * terms.cp * terms.dp, rates)
    hidden = terms.overlap_p2p * (terms.vpp > 1) * rates.constants.overlap
    return 2 * once * (terms.microbatches * terms.vpp * (1 - hidden) + terms.pp - 1)
