"""The model of a step: layers, pipeline, data parallelism and optimizer put together.

Physics first: FLOPs, bytes and messages are counted from the workload, rates come from data sheets times a
few fitted efficiencies (`constants`). For one workload ask `step_time`; to score many, `stack` their terms
and ask `step_parts` once; `layer_seconds` and `pipeline_seconds` are the pieces that can be kept between
neighbours.
"""

from __future__ import annotations

from megaplug.plan.cluster import Cluster
from megaplug.plan.step_time.breakdown import StepTime
from megaplug.plan.step_time.choice import constants_of
from megaplug.plan.step_time.constants import Constants
from megaplug.plan.step_time.layer import layer_seconds
from megaplug.plan.step_time.pipeline import pipeline_seconds
from megaplug.plan.step_time.rates import Rates, rates_of
from megaplug.plan.step_time.step_end import data_parallel_seconds, optimizer_seconds
from megaplug.plan.step_time.terms import Number, Terms, terms_of
from megaplug.plan.workload import Workload


def step_time(workload: Workload, cluster: Cluster, constants: Constants | None = None) -> StepTime:
    """How long one step of a workload takes: modelled.

    Args:
        workload: A legal job.
        cluster: The machines.
        constants: The fitted numbers; those that `constants_of` finds if None.

    Raises:
        UserError: If the layers cannot be dealt out, or the cluster has no peak for the number format.
    """
    compute = workload.precision.compute
    constants = constants or constants_of(workload, cluster)
    parts = step_parts(terms_of(workload), rates_of(cluster, compute, constants), moe=workload.shape.is_moe)
    return StepTime(**{name: float(seconds) for name, seconds in parts.items()}, error=constants.error)


def step_parts(terms: Terms, rates: Rates, *, moe: bool) -> dict[str, Number]:
    """The parts of `StepTime` in seconds, as arrays where the terms are arrays.

    Args:
        terms: The numbers of one workload, or of many on the same machines in the same number format.
        rates: What the machines reach.
        moe: Whether any workload has layers with experts.
    """
    pipeline = pipeline_seconds(
        terms,
        rates,
        layer_seconds(terms, rates, moe=False),
        layer_seconds(terms, rates, moe=True) if moe else None,
    )
    return {
        "compute": pipeline.compute,
        "tp": pipeline.tp,
        "cp": pipeline.cp,
        "ep": pipeline.ep,
        "pp": pipeline.pp,
        "bubble": pipeline.bubble,
        "dp": data_parallel_seconds(terms, rates, pipeline),
        "optimizer": optimizer_seconds(terms, rates),
    }
