"""A job with other TP and PP sizes on the same GPUs: its time and memory, or the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megaplug.errors import Problem
from megaplug.job.schema import TopologyConfig
from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import GIB, estimate
from megaplug.plan.step_time import step_time
from megaplug.plan.workload import Workload
from megaplug.topology import Topology, resolve, violations

MOST_TP, MOST_PP = 7, 10
"""Columns and rows of a heat map that can still be read."""


@dataclass(frozen=True)
class Cell:
    """One (tp, pp) of a job.

    Attributes:
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        own: Whether it is the job's own.
        problems: Every rule that it breaks; empty if it can be.
        rule: The first of them in a few letters.
        memory: Modelled bytes of the fullest rank; None if it cannot be.
        usable: Bytes that a rank may take.
        seconds: Modelled time of a step; None if it cannot be.
    """

    tp: int
    pp: int
    own: bool
    problems: tuple[Problem, ...] = ()
    rule: str = ""
    memory: float | None = None
    usable: float = 0.0
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether it can be and its fullest rank fits into the device."""
        return self.memory is not None and self.memory <= self.usable

    def data(self) -> dict[str, Any]:
        """The cell's numbers."""
        told = {"tp": self.tp, "pp": self.pp, "own": self.own}
        if self.memory is None:
            return told | {"rule": self.rule, "problems": [str(problem) for problem in self.problems]}
        return told | {"memory_gib": self.memory / GIB, "fits": self.fits, "step_seconds": self.seconds}


def cells_of(workload: Workload, cluster: Cluster) -> list[Cell]:
    """Every cell of the job's heat map, by rows of pp and then tp.

    Batch, precision, recompute, cp, ep and the number of GPUs stay; dp follows. Where pp is not the job's,
    virtual stages are given up, and a job that names the layers of its first and last stage gets
    `uneven_ends`.

    Args:
        workload: The job; its own topology may be one that cannot be.
        cluster: Its machines.
    """
    return [
        _cell(workload, cluster, tp, pp) for pp in pipeline_sizes(workload) for tp in tensor_sizes(workload)
    ]


def tensor_sizes(workload: Workload) -> list[int]:
    """The columns: powers of two, and the job's own."""
    own = workload.topology.tp
    return sorted(
        {own, *(2**power for power in range(MOST_TP - 1) if 2**power <= workload.topology.world_size)}
    )


def pipeline_sizes(workload: Workload) -> list[int]:
    """The rows: the job's own, powers of two, and the nearest others that divide the layers."""
    layers, world, own = workload.shape.num_layers, workload.topology.world_size, workload.topology.pp
    most = min(layers, world, max(32, 2 * own))
    chosen = {own, *(2**power for power in range(most.bit_length()) if 2**power <= most)}
    others = [size for size in range(1, most + 1) if layers % size == 0 and size not in chosen]
    others.sort(key=lambda size: (world % size != 0, max(size, own) / min(size, own)))
    # One that divides the layers but not the GPUs is enough to show the rule.
    others = [size for size in others if world % size == 0 or size == others[0]]
    return sorted({*chosen, *others[: max(0, MOST_PP - len(chosen))]})


def uneven_ends(num_layers: int, num_stages: int) -> int | None:
    """Layers of the first and of the last stage that leave all others equal and the fullest stage least full.

    Returns:
        None where the layers divide evenly, or there is no such number.
    """
    middle = num_stages - 2
    if num_layers % num_stages == 0 or middle < 1:
        return None
    ends = [
        (max(end, (num_layers - 2 * end) // middle), end)
        for end in range(1, num_layers // 2)
        if num_layers - 2 * end >= middle and (num_layers - 2 * end) % middle == 0
    ]
    return min(ends)[1] if ends else None


def _cell(workload: Workload, cluster: Cluster, tp: int, pp: int) -> Cell:
    job, shape = workload.topology, workload.shape
    first, last = job.decoder_first_pipeline_num_layers, job.decoder_last_pipeline_num_layers
    if pp != job.pp:
        first = last = None if first is None and last is None else uneven_ends(shape.num_layers, pp)
    follows = job.etp == job.tp
    # A job without sequence parallelism at tp > 1 keeps it off; at tp 1 nobody could have it on.
    parallel = False if job.tp > 1 and not job.sequence_parallel else None
    topology, problems = resolve(
        TopologyConfig(
            tp=tp,
            pp=pp,
            vpp=job.vpp if pp == job.pp else None,
            cp=job.cp,
            ep=job.ep,
            etp=None if follows else job.etp,
            world_size=job.world_size,
            sequence_parallel=parallel,
            decoder_first_pipeline_num_layers=first,
            decoder_last_pipeline_num_layers=last,
            account_for_embedding_in_pipeline_split=job.account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split=job.account_for_loss_in_pipeline_split,
        )
    )
    own = (tp, pp) == (job.tp, job.pp)
    if topology is not None:
        problems += violations(topology, shape, workload.batch, overlap_p2p_comm=workload.overlaps.p2p)
    if problems or topology is None:
        return Cell(tp, pp, own, tuple(problems), short_rule(problems[0], workload, topology))
    moved = replace(workload, topology=topology)
    return Cell(
        tp,
        pp,
        own,
        memory=estimate(moved).total,
        usable=cluster.usable_memory,
        seconds=step_time(moved, cluster).total,
    )


def short_rule(problem: Problem, workload: Workload, topology: Topology | None) -> str:
    """A broken rule in a few words, such as ``8 does not divide 126 layers``; its key where none is known."""
    write = _SHORT.get(problem.key)
    if write is None or topology is None:
        return problem.key.rpartition(".")[2].replace("_", " ")
    return write(workload, topology)


def _not_dividing(size: int, number: int, what: str) -> str:
    return f"{size:,} does not divide {number:,} {what}"


def _tensor_rule(workload: Workload, topology: Topology) -> str:
    shape, tp = workload.shape, topology.tp
    if shape.num_attention_heads % tp:
        return _not_dividing(tp, shape.num_attention_heads, "heads")
    if shape.num_query_groups % tp and tp % shape.num_query_groups:
        return _not_dividing(tp, shape.num_query_groups, "KV groups")
    return _not_dividing(tp, shape.ffn_hidden_size, "of the MLP")


def _expert_rule(workload: Workload, topology: Topology) -> str:
    experts, block = workload.shape.num_experts or 0, topology.etp * topology.ep * topology.pp
    if experts % topology.ep:
        return _not_dividing(topology.ep, experts, "experts")
    return f"EP x ETP x PP = {_not_dividing(block, topology.world_size, 'GPUs')}"


_SHORT: dict[str, Callable[[Workload, Topology], str]] = {
    "topology.world_size": lambda load, mesh: _not_dividing(
        mesh.tp * mesh.pp * mesh.cp, mesh.world_size, "GPUs"
    ),
    "topology.tp": _tensor_rule,
    "topology.pp": lambda load, mesh: _not_dividing(mesh.pp, load.shape.num_layers, "layers"),
    "topology.vpp": lambda load, mesh: f"{mesh.vpp} virtual stages with PP{mesh.pp}",
    "topology.cp": lambda load, mesh: _not_dividing(2 * mesh.cp, load.shape.seq_length, "tokens"),
    "topology.ep": _expert_rule,
    "topology.etp": lambda load, mesh: _not_dividing(mesh.etp, load.shape.expert_ffn_size, "of an expert"),
    "topology.sequence_parallel": lambda load, mesh: (
        _not_dividing(mesh.cp * mesh.tp, load.shape.seq_length, "tokens")
        if load.shape.seq_length % (mesh.cp * mesh.tp)
        else "needs sequence parallelism"
    ),
    "model.num_query_groups": lambda load, mesh: _not_dividing(
        load.shape.num_query_groups, load.shape.num_attention_heads, "heads"
    ),
    "train.global_batch_size": lambda load, mesh: _not_dividing(
        load.batch.micro_batch_size * mesh.dp, load.batch.global_batch_size, "sequences"
    ),
}
