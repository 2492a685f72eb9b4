"""A job on fewer and on more GPUs: tokens a second and MFU, with the same batch and with one that grows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import GIB
from megaplug.plan.plan import make_plan
from megaplug.plan.workload import Workload
from megaplug.topology import Batch, violations

DOUBLINGS = 3
"""Beyond the job's own number of GPUs."""

Batches = Literal["fixed", "growing"]


@dataclass(frozen=True)
class Size:
    """The job with one data-parallel size.

    Attributes:
        batches: Whether the global batch stays (strong scaling) or grows with the GPUs (weak scaling).
        num_gpus: Ranks.
        global_batch_size: Sequences of a step.
        own: Whether it is the job itself.
        seconds: Modelled, of a step.
        tokens_per_second: Of all GPUs.
        mfu: Part of the peak that model FLOPs take; causal attention, no recompute (see `job.flops`).
        memory: Modelled bytes of the fullest rank.
        fits: Whether they fit into the device.
    """

    batches: Batches
    num_gpus: int
    global_batch_size: int
    own: bool
    seconds: float
    tokens_per_second: float
    mfu: float
    memory: float
    fits: bool

    def data(self) -> dict[str, Any]:
        """Its numbers."""
        return {
            "batch": self.batches,
            "num_gpus": self.num_gpus,
            "global_batch_size": self.global_batch_size,
            "own": self.own,
            "step_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu_causal": self.mfu,
            "memory_gib": self.memory / GIB,
            "fits": self.fits,
        }


def sizes_of(workload: Workload, cluster: Cluster) -> list[Size]:
    """The job with dp 1, 2, 4 and so on; those that break a rule are left out.

    Args:
        workload: A legal job.
        cluster: Its machines; where their number is known, no more are asked for.
    """
    own = workload.topology.dp
    # Doubling and halving from the job's own size, so that it is one of them.
    halvings = (own & -own).bit_length() - 1
    dps = [own * 2**power if power >= 0 else own >> -power for power in range(-halvings, DOUBLINGS + 1)]
    tried = (_size(workload, cluster, dp, batches) for batches in get_args(Batches) for dp in dps)
    return [size for size in tried if size is not None]


def _size(workload: Workload, cluster: Cluster, dp: int, batches: Batches) -> Size | None:
    job, batch = workload.topology, workload.batch
    num_gpus = job.tp * job.pp * job.cp * dp
    total = batch.global_batch_size
    if batches == "growing":
        total = total * dp // job.dp
    moved = replace(
        workload,
        topology=replace(job, dp=dp, world_size=num_gpus),
        batch=Batch(batch.micro_batch_size, total),
    )
    if cluster.num_gpus is not None and num_gpus > cluster.num_gpus:
        return None
    if violations(moved.topology, moved.shape, moved.batch, overlap_p2p_comm=moved.overlaps.p2p):
        return None
    plan = make_plan(moved, cluster)
    assert plan.time is not None and plan.tokens_per_second is not None, "CPU ranks have no time"
    return Size(
        batches,
        num_gpus,
        total,
        dp == job.dp,
        plan.time.total,
        plan.tokens_per_second,
        plan.mfu["causal"],
        plan.fullest.memory.total,
        plan.spare_memory >= 0,
    )
