"""The plan's figures beside those of a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.job.checks import job_shape, resolve_topology
from megaplug.job.schema import Job
from megaplug.plan.memory import StageMemory, stage_memory
from megaplug.plan.parameters import rank_parameters
from megaplug.plan.rehearsal.frozen import rehearsed_job
from megaplug.plan.rehearsal.result import RankRehearsal
from megaplug.plan.workload import workload_of


@dataclass(frozen=True)
class Figure:
    """One figure twice.

    Attributes:
        name: What it is.
        unit: ``parameters`` or ``bytes``.
        planned: In closed form.
        rehearsed: Counted.
    """

    name: str
    unit: str
    planned: int
    rehearsed: int

    @property
    def difference(self) -> int:
        """What the plan has more."""
        return self.planned - self.rehearsed

    @property
    def relative(self) -> float:
        """The difference as a part of what was rehearsed; 0 where both are nothing."""
        if self.rehearsed:
            return self.difference / self.rehearsed
        return 0.0 if not self.difference else float("inf")


def compare(job: Job, rehearsed: RankRehearsal) -> list[Figure]:
    """The figures that plan and rehearsal both have.

    Args:
        job: The job whose rank was rehearsed.
        rehearsed: What was counted.
    """
    job = rehearsed_job(job)
    topology, shape = resolve_topology(job), job_shape(job)
    held = rank_parameters(shape, topology, rehearsed.rank)
    memory = stage_memory(workload_of(job, topology, shape), rehearsed.stage)
    at_rest, at_peak = rehearsed.at_rest, rehearsed.at_peak
    state = ("weights", "gradients", "optimizer")
    kept = sum(size for name, size in at_peak.items() if name not in state)
    return [
        Figure("parameters", "parameters", held.total, rehearsed.parameters),
        Figure("of them experts", "parameters", held.expert, rehearsed.expert_parameters),
        *(Figure(name, "bytes", getattr(memory, name), at_rest[name]) for name in state),
        Figure("activations, logits and workspace", "bytes", _beside_state(memory), kept),
        Figure("peak", "bytes", memory.total, rehearsed.peak_bytes),
    ]


def _beside_state(memory: StageMemory) -> int:
    return memory.total - memory.weights - memory.gradients - memory.optimizer
