"""Starting from another run: which checkpoint ``load=`` names, and whether this job can take it over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.job.freeze import FrozenJob, read_frozen
from megaplug.job.identity import differing_keys, model_fingerprint
from megaplug.job.schema import Job
from megaplug.job.sharding import implementation
from megaplug.job.upcycling import UPCYCLE, upcycling_problems
from megaplug.runs.atomic import disk_errors, write_text_atomic
from megaplug.runs.checkpoints import TRACKER, Checkpoint, faults_of, list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import read_manifest


@dataclass(frozen=True)
class Source:
    """A whole checkpoint of another run.

    Attributes:
        checkpoint: Its folder and iteration.
        weights_only: Whether optimizer, schedule and data position are left behind.
        frozen: The job that wrote it; None where its ``job.yaml`` is not beside it.
        fingerprint: The model that it holds, see ``identity.model_fingerprint``; None where not known.
        passed_over: Newer checkpoints of that run that are not whole, and why.
    """

    checkpoint: Checkpoint
    weights_only: bool
    frozen: FrozenJob | None
    fingerprint: Mapping[str, Any] | None
    passed_over: tuple[str, ...] = ()

    def staging(self, folder: RunFolder) -> Path:
        """The folder that Megatron is given: only this checkpoint and a tracker that names it."""
        return folder.path.resolve() / "load"

    def stage(self, folder: RunFolder) -> Path:
        """Make the staging folder of a run and return it.

        Raises:
            UserError: The disk is full or may not be written to.
        """
        staging = self.staging(folder)
        # As Megatron spells it, however the folder is called.
        link = staging / f"iter_{self.checkpoint.iteration:07d}"
        with disk_errors(staging, "name the checkpoint in"):
            staging.mkdir(parents=True, exist_ok=True)
            for old in staging.glob("iter_*"):
                if old.is_symlink():
                    old.unlink()
            link.symlink_to(self.checkpoint.path.resolve(), target_is_directory=True)
        write_text_atomic(staging / TRACKER, f"{self.checkpoint.iteration}\n")
        return staging


def find_source(job: Job, tell: Callable[[Path, int], None] | None = None) -> Source | None:
    """Find what ``load=`` names; None when the job starts from scratch.

    Args:
        job: It.
        tell: Called, on several threads, with the checkpoint that is verified and how much more of it is.

    Raises:
        UserError: There is no such run or checkpoint, or none of its checkpoints is whole.
    """
    if job.load is None:
        return None
    path = Path(job.load).expanduser()
    if not path.is_dir():
        raise UserError(
            f"load: {job.load} is not a folder", hint="give a run's folder or one of its checkpoints/iter_*"
        )
    if path.name.startswith("iter_"):
        checkpoints_dir, found = path.parent, _single(path, tell)
        passed_over: tuple[str, ...] = ()
    else:
        checkpoints_dir = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found, passed_over = _newest_whole(checkpoints_dir, job.load, tell)
    job_file = checkpoints_dir.parent / "job.yaml"
    frozen = read_frozen(job_file) if job_file.is_file() else None
    fingerprint = _fingerprint(found.path, frozen)
    return Source(found, job.load_state != "all", frozen, fingerprint, passed_over)


def _faults(path: Path, tell: Callable[[Path, int], None] | None) -> list[str]:
    return faults_of(path, tell and functools.partial(tell, path))


def _single(path: Path, tell: Callable[[Path, int], None] | None) -> Checkpoint:
    named = [item for item in list_checkpoints(path.parent) if item.path.name == path.name]
    faults = _faults(path, tell)
    if faults or not named:
        raise UserError(
            f"load: {path} is not a whole checkpoint: {faults[0] if faults else 'its name is no iteration'}",
            hint="name another one, or the run's folder for its newest whole one",
        )
    return named[0]


def _newest_whole(
    checkpoints_dir: Path, given: str, tell: Callable[[Path, int], None] | None
) -> tuple[Checkpoint, tuple[str, ...]]:
    present = list_checkpoints(checkpoints_dir)
    if not present and not any(
        (place / "job.yaml").is_file() for place in (checkpoints_dir, checkpoints_dir.parent)
    ):
        raise UserError(
            f"load: {given} is neither a run nor a checkpoint",
            hint="give a run's folder or one of its checkpoints/iter_*",
        )
    if not present:
        raise UserError(
            f"load: {given} has no checkpoint", hint="it was stopped before its first one was saved"
        )
    passed_over: list[str] = []
    for checkpoint in reversed(present):
        faults = _faults(checkpoint.path, tell)
        if not faults:
            return checkpoint, tuple(passed_over)
        passed_over.append(f"step {checkpoint.iteration:,} is not whole: {faults[0]}")
    none = f"none of the {len(present)} checkpoints of {given} is whole"
    if len(present) == 1:
        none = f"the only checkpoint of {given} is not whole"
    raise UserError(
        f"load: {none} ({passed_over[0]})",
        hint="continue that run first: it goes on from the start and saves new ones"
        if (checkpoints_dir.parent / "job.yaml").is_file()
        else "name another copy; launch/checkpoint.py action=verify run=FOLDER says what is wrong with each",
    )


def _fingerprint(path: Path, frozen: FrozenJob | None) -> Mapping[str, Any] | None:
    if frozen is not None:
        return frozen.model_fingerprint
    manifest = read_manifest(path) or {}
    model = manifest.get("extra", manifest).get("model")
    return model if isinstance(model, Mapping) else None


def source_problems(job: Job, source: Source, derived: Any, topology: Any, facts: Any) -> list[Problem]:
    """Why this job cannot start from ``source``; the differing keys by name.

    Args:
        job: The job that wants to load.
        source: What :func:`find_source` found.
        derived: Its derived figures.
        topology: Its resolved rank grid.
        facts: Its data.
    """
    if source.fingerprint is None:
        hint = "only checkpoints that megaplug wrote can be loaded: their manifest names the model"
        return [Problem("load", f"{source.checkpoint.path} does not say which model it holds", hint)]
    ours = model_fingerprint(job, derived, facts)
    if job.load_state == UPCYCLE:
        return upcycling_problems(job, source.fingerprint, ours)
    problems = [
        Problem("load", f"the checkpoint is of another model: {key} is {theirs!r} there and {mine!r} here")
        for key, theirs, mine in differing_keys(source.fingerprint, ours)
    ]
    if problems:
        hint = "set what differs as it is there, or leave load out"
        if ours["moe.num_experts"] and not source.fingerprint.get("moe.num_experts"):
            hint = "load_state=upcycle makes experts of a dense model"
        problems[-1] = Problem(problems[-1].key, problems[-1].message, hint)
    if source.frozen is not None:
        problems += _sharding_problems(job, source.frozen.job, whole=not source.weights_only)
    if source.weights_only:
        return problems
    return problems + _whole_state_problems(job, source, derived, topology, facts)


def _sharding_problems(job: Job, there: Job, *, whole: bool) -> list[Problem]:
    """What one way of sharding cannot read of what another has saved."""
    before, now = implementation(there), implementation(job)
    if before == now:
        return []
    typed, same = _zero(there), f"use {_zero(there)}"
    if "megatron_fsdp" in (before, now):
        message = f"Megatron-FSDP has its own format: it was {typed} there and is {_zero(job)} here"
        return [Problem("load", message, same)]
    if whole:
        message = f"the optimizer's state was saved with {typed}, and {_zero(job)} cannot read it"
        return [Problem("load_state", message, f"{same} or load_state=weights")]
    return []


def _zero(job: Job) -> str:
    words = f"topology.zero={job.topology.zero}"
    return f"{words} topology.fsdp={job.topology.fsdp}" if job.topology.zero >= 2 else words


def _whole_state_problems(job: Job, source: Source, derived: Any, topology: Any, facts: Any) -> list[Problem]:
    """What Megatron cannot reshard or continue, beyond another model."""
    if source.frozen is None:
        return [
            Problem(
                "load_state", "all needs the job.yaml of the run that is loaded", "use load_state=weights"
            )
        ]
    there = source.frozen
    pairs = [
        ("optimizer.optimizer", there.job.optimizer.optimizer, job.optimizer.optimizer),
        ("precision.bf16", there.job.precision.bf16, job.precision.bf16),
        ("precision.fp16", there.job.precision.fp16, job.precision.fp16),
        # The position in the data is a number of samples of this text.
        ("model.seq_length", there.job.model.seq_length, job.model.seq_length),
        ("train.global_batch_size", there.job.train.global_batch_size, job.train.global_batch_size),
    ]
    problems = [
        Problem("load_state", f"all goes on where that run was, but {key} is {theirs} there and {mine} here",
                f"use {key}={str(theirs).lower()} or load_state=weights")
        for key, theirs, mine in pairs
        if theirs != mine
    ]  # fmt: skip
    if there.facts.fingerprint != facts.fingerprint:
        message = f"all goes on in the same text, but that run read {there.facts.source}"
        problems.append(Problem("load_state", message, "use load_state=weights for other text"))
    if (there.topology.ep > 1) != (topology.ep > 1):
        message = (
            f"Megatron cannot reshard the optimizer's state from ep={there.topology.ep} to ep={topology.ep}"
        )
        problems.append(
            Problem("load_state", message, "change ep only between values above 1, or use load_state=weights")
        )
    stop_at = job.train.stop_at
    if stop_at is not None and stop_at <= source.checkpoint.iteration < derived.iters:
        message = f"the loaded run is at step {source.checkpoint.iteration} already"
        problems.append(Problem("train.stop_at", message, "stop later, or use load_state=weights"))
    if source.checkpoint.iteration >= derived.iters:
        message = (
            f"the loaded run is at step {source.checkpoint.iteration}, and this one ends at {derived.iters}"
        )
        problems.append(Problem("train.iters", message, "give more steps, or use load_state=weights"))
    return problems
