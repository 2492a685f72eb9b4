"""What a machine reaches: its peaks times the fitted efficiencies, in FLOP/s, bytes/s and seconds."""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.errors import UserError
from megaplug.plan.cluster import Cluster, format_problem
from megaplug.plan.step_time.constants import Constants


@dataclass(frozen=True)
class Rates:
    """Of one GPU, in one number format.

    Attributes:
        products: FLOP/s of large matrix products.
        head: FLOP/s of the product with the vocabulary, which is not cast to fewer bytes.
        attention: FLOP/s of fused attention, in bf16 too.
        memory: Bytes/s.
        link: Bytes/s in one direction inside the NVLink domain.
        network: Bytes/s in one direction of the adapter.
        link_domain: GPUs that the links join.
        constants: The seconds and passes among the fitted numbers.
    """

    products: float
    head: float
    attention: float
    memory: float
    link: float
    network: float
    link_domain: int
    constants: Constants


def rates_of(cluster: Cluster, compute: str, constants: Constants) -> Rates:
    """The rates of a cluster in one number format.

    Args:
        cluster: The machines.
        compute: What matrix products are computed in: a key of ``Cluster.peak_flops``.
        constants: The fitted efficiencies.

    Raises:
        UserError: If the cluster has no peak for the format.
    """
    if problem := format_problem(cluster, compute):
        raise UserError.from_problems([problem])
    peak = cluster.peak_flops[compute]
    attention_peak = cluster.peak_flops.get("bf16", peak) if compute not in ("fp32", "tf32") else peak
    return Rates(
        products=peak * constants.gemm_efficiency,
        head=attention_peak * constants.head_efficiency,
        attention=attention_peak * constants.attention_efficiency,
        memory=cluster.memory_bandwidth * constants.memory_efficiency,
        link=cluster.link_bandwidth * constants.link_efficiency,
        network=cluster.network_bandwidth * constants.network_efficiency,
        link_domain=cluster.link_domain,
        constants=constants,
    )
