"""Seconds at the end of a step: gradients reduced, the optimizer, weights gathered.

The distributed optimizer scatters the sum of gradients (``gradient_bytes``) and gathers the new weights
(``parameter_bytes``) over data and context parallelism, for experts over expert data parallelism. Overlapped,
the one runs beside the last microbatch's backward, the other beside the first's forward. Under ZeRO-3 weights
are gathered for every microbatch, forward and backward, and gradients scattered after each.
"""

from __future__ import annotations

from megaplug.plan.numbers import least, most, where
from megaplug.plan.step_time.collectives import ring_seconds
from megaplug.plan.step_time.pipeline import PipelineSeconds
from megaplug.plan.step_time.rates import Rates
from megaplug.plan.step_time.terms import Number, Terms


def data_parallel_seconds(terms: Terms, rates: Rates, pipeline: PipelineSeconds) -> Number:
    """What of reducing gradients and gathering weights nothing hides.

    Args:
        terms: The workload's numbers.
        rates: What the machines reach.
        pipeline: The seconds of its microbatches, behind which communication may hide.
    """
    gather = _over_replicas(terms, rates, terms.parameter_bytes)
    reduce = _over_replicas(terms, rates, terms.gradient_bytes)
    window = rates.constants.overlap
    sharded = terms.zero >= 3
    # An all-reduce without the distributed optimizer: the gradients are gathered as well as scattered.
    gather = where(terms.zero >= 1, gather, 0.0)
    reduce = where(terms.zero >= 1, reduce, 2 * reduce)
    times = where(sharded, terms.microbatches, 1)
    gather = gather * where(sharded, 2, 1)
    # Interleaving ends (and begins) each virtual stage in turn, pp microbatches apart.
    turns = where(terms.vpp > 1, least(terms.pp, terms.microbatches), 1)
    exposed_gather = _exposed(gather, turns * pipeline.forward * terms.overlap_gather, window)
    exposed_reduce = _exposed(reduce, turns * pipeline.backward * terms.overlap_reduce, window)
    together = _exposed(gather + reduce, pipeline.forward + pipeline.backward, window)
    return times * where(sharded, together, exposed_gather + exposed_reduce)


def optimizer_seconds(terms: Terms, rates: Rates) -> Number:
    """Reads and writes of the optimizer's state, its gradients and weights; and what a step has once."""
    shared = terms.zero >= 1
    own = where(shared, terms.dense_parameters / (terms.dp * terms.cp), terms.dense_parameters)
    own = own + where(shared, terms.expert_parameters / terms.expert_dp, terms.expert_parameters)
    moved = own * (2 * terms.optimizer_bytes + 2 * terms.gradient_bytes)
    return moved / rates.memory + rates.constants.step_seconds


def _over_replicas(terms: Terms, rates: Rates, of_parameter: Number) -> Number:
    dense = ring_seconds(terms.dense_parameters * of_parameter, terms.dp * terms.cp, terms.tp, rates)
    expert = ring_seconds(
        terms.expert_parameters * of_parameter, terms.expert_dp, terms.etp * terms.ep, rates
    )
    return dense + where(terms.expert_parameters > 0, expert, 0.0)


def _exposed(sent: Number, beside: Number, overlap: Number) -> Number:
    """What is left of a transfer that runs beside ``beside`` seconds of work, of which it slows the rest.

    The last bucket has nothing to hide behind, and what is hidden takes cores and memory from the work.
    """
    return where(beside > 0, most((1 - overlap) * sent, sent - overlap * beside), sent)
