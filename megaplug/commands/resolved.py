"""A job with everything known about it: the one road from a typed job to what can be shown or started."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megaplug.commands.reading import reading
from megaplug.errors import Problem, UserError
from megaplug.job.checks import check, check_facts, job_shape, resolve_topology
from megaplug.job.derive import Derived, derive, resolve_device
from megaplug.job.facts import DataFacts
from megaplug.job.freeze import FrozenJob
from megaplug.job.identity import digest, identity, model_fingerprint
from megaplug.job.load import Source, find_source, source_problems
from megaplug.job.packages import backend_problem, resolve_backend
from megaplug.job.retention import retention
from megaplug.job.schema import Job
from megaplug.launchers.machine import Machine, detect_machine, machine_problems
from megaplug.plan.memory import StageMemory, estimate
from megaplug.plan.parameters import total_parameters
from megaplug.plan.workload import workload_of
from megaplug.runs.checkpoints import stored_bytes
from megaplug.runs.folder import find_latest
from megaplug.topology import ModelShape, Topology

# A checkpoint holds weights, fp32 master weights and the two moments of Adam, at most: bytes a parameter.
_CHECKPOINT_BYTES = 16


@dataclass(frozen=True)
class Resolved:
    """A job that can be started.

    Attributes:
        job: With device and backend as they are on this machine.
        topology: The rank grid.
        facts: The data.
        derived: Lengths, vocabulary, intervals.
        shape: The model's sizes.
        parameters: Of the whole model, with the vocabulary as padded.
        memory: Modelled, of the fullest rank.
        source: What it starts from, if not from scratch.
        digest: Eight digits of all that decides the result.
        fingerprint: The model as its weights know it.
    """

    job: Job
    topology: Topology
    facts: DataFacts
    derived: Derived
    shape: ModelShape
    parameters: int
    memory: StageMemory
    source: Source | None
    digest: str
    fingerprint: dict[str, object]


def check_job(job: Job, machine: Machine | None = None) -> list[Problem]:
    """Everything that is wrong before the data is looked at, with the device that ``job`` means here."""
    machine = machine or detect_machine()
    device = resolve_device(job.device, machine.num_gpus)
    backend = backend_problem(job, device)
    return [*check(job, device=device), *([backend] if backend else [])]


def resolve(job: Job, *, on_this_machine: bool = True, frozen: FrozenJob | None = None) -> Resolved:
    """Check a job, prepare its data and work out all that follows.

    Args:
        job: As composed.
        on_this_machine: Whether it is to run here, so that it must fit.
        frozen: What it was made of before, where its run has checkpoints of its own to go on from: what it
            began with is not looked for any more, since it may have gone or been trained on.

    Raises:
        UserError: All that is wrong, as far as it can be seen at once.
    """
    from megaplug.data.prepare import prepare, too_small

    machine = detect_machine()
    problems = check_job(job, machine)
    if problems:
        raise UserError.from_problems(problems)
    asked, device = job.device, resolve_device(job.device, machine.num_gpus)
    job = dataclasses.replace(
        job, device=device, backend=resolve_backend(job.backend, device, job.kernels.te)
    )
    topology = resolve_topology(job)
    if on_this_machine:
        # The size of the vocabulary is not known yet; the number of ranks may already be too large.
        _raise(machine_problems(machine, ranks_here(job, topology), 0, device))
    with reading(_may_talk(job)) as shown:
        source = None if frozen is not None else find_source(job, shown.tell)

    facts = prepare(job, show_progress=None if _may_talk(job) else False)
    if small := too_small(facts, job.model.seq_length):
        _raise([*_without_gpus(job, asked), *small])
    derived = derive(job, topology, facts, device=device, backend=job.backend)
    problems = check_facts(job, derived, facts)
    if source is not None:
        problems += source_problems(job, source, derived, topology, facts)
    shape = job_shape(job, derived.vocab_size)
    parameters = total_parameters(shape, padded_for_tp=topology.tp)
    memory = memory_of(job, topology, shape)
    run_digest = digest(identity(job, topology, derived, facts, source))
    if frozen is not None:
        before = digest(identity(frozen.job, frozen.topology, frozen.derived, frozen.facts))
        run_digest = frozen.digest if run_digest == before else run_digest
    if on_this_machine:
        problems += machine_problems(
            machine,
            ranks_here(job, topology),
            memory.total if device == "cpu" else 0,
            device,
            bytes_beside_saving=_bytes_beside_saving(derived, memory),
            runs_dir=Path(job.runs_dir),
            checkpoint_bytes=_room_for_checkpoints(job, derived, run_digest, parameters),
        )
    _raise(problems)
    return Resolved(
        job=job,
        topology=topology,
        facts=facts,
        derived=derived,
        shape=shape,
        parameters=parameters,
        memory=memory,
        source=source,
        digest=run_digest,
        fingerprint=model_fingerprint(job, derived, facts),
    )


def ranks_here(job: Job, topology: Topology) -> int:
    """How many ranks one machine of the job runs."""
    return topology.world_size // (job.launch.nnodes or 1)


def problems_here(resolved: Resolved) -> list[Problem]:
    """Why a job that was resolved for any machine could not run on this one; none if it could."""
    device = resolved.derived.device
    return machine_problems(
        detect_machine(),
        resolved.topology.world_size,
        resolved.memory.total if device == "cpu" else 0,
        device,
        bytes_beside_saving=_bytes_beside_saving(resolved.derived, resolved.memory),
    )


def _bytes_beside_saving(derived: Derived, memory: StageMemory) -> int:
    """What is written is there twice on a CPU, once as the writers saw it and once as training goes on."""
    beside = derived.device == "cpu" and derived.async_strategy
    return memory.weights + memory.optimizer if beside else 0


def _without_gpus(job: Job, asked: str) -> list[Problem]:
    """That a job for a cluster of GPUs came to a machine that has none; said where its sizes do not fit."""
    if asked != "auto" or job.device != "cpu" or job.cluster.device != "cuda":
        return []
    return [
        Problem(
            "device",
            f"there is no GPU here, and the job is for cluster={job.cluster.name}",
            "start it on such a machine, plan it with launch/plan.py, or make it small: docs/long_context.md "
            "shows how",
        )
    ]


def _raise(problems: list[Problem]) -> None:
    if problems:
        raise UserError.from_problems(problems)


def _may_talk(job: Job) -> bool:
    return job.logging.progress != "none" and job.launch.output == "text"


def _room_for_checkpoints(job: Job, derived: Derived, run_digest: str, parameters: int) -> int:
    """Bytes that checkpoints will take beyond what they do now; a save needs one more than is kept."""
    number = retention(job).at_once(derived.save_interval, derived.iters)
    folder = find_latest(Path(job.runs_dir), job.name, run_digest) if job.resume else None
    present = stored_bytes(folder.checkpoints) if folder is not None else 0
    return max(0, parameters * _CHECKPOINT_BYTES * number - present)


def memory_of(job: Job, topology: Topology, shape: ModelShape) -> StageMemory:
    """The modelled memory of a job's fullest rank."""
    return estimate(workload_of(job, topology, shape))
