"""``launch=slurm``: jobs are checked and frozen here, and SLURM is given their batch script."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megaplug.commands.batch_job import Prepared, on_nodes, script_of
from megaplug.commands.cli import CommandLine
from megaplug.commands.readiness import first_iteration, make_ready, open_folder, repair_notes
from megaplug.commands.resolved import resolve
from megaplug.commands.run import nothing_to_do
from megaplug.commands.runs_queue import queues_of
from megaplug.errors import UserError
from megaplug.job.schema import Job
from megaplug.launchers import slurm
from megaplug.runs import checkpoints
from megaplug.runs.atomic import write_text_atomic
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import RunLock
from megaplug.runs.submitted import Submitted, write_submitted


def submit(job: Job, command: CommandLine) -> int:
    """Queue a run, or what is left of it.

    Raises:
        UserError: What is wrong with the job, all at once; a job of this run is in the queue already; SLURM
            refuses it.
    """
    with ExitStack() as locks:
        run = _prepared(job, command, locks)
        if isinstance(run, str):
            raise UserError(run, hint="wait for it, or take it out: launch/runs.py action=stop run=...")
        if run is None:
            return 0
        script = run.folder.batch_script
        write_text_atomic(script, script_of([run], script))
        jobs: list[str] = []
        for _ in range(job.slurm.chain if job.launch.submit else 0):
            behind = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            jobs.append(slurm.submit(script, behind))
            # At once: what is in the queue must be known, whatever becomes of the next.
            _keep(run, jobs)
    _say(run, jobs)
    return 0


@dataclass(frozen=True)
class Array:
    """Runs of a sweep that one script starts.

    Attributes:
        script: Its file.
        job: SLURM's number; empty where it was only written.
        folders: Of the runs, in the order of the array.
    """

    script: Path
    job: str
    folders: tuple[RunFolder, ...]


def submit_all(jobs: Sequence[tuple[Job, CommandLine]], place: Path) -> list[Array]:
    """Queue runs as one array, or as one for each kind of nodes that they ask for.

    Args:
        jobs: Each with the command that would start it alone.
        place: The folder where scripts and their logs go.

    Raises:
        UserError: As `submit`; before the first script is written nothing is queued.
    """
    with ExitStack() as locks:
        prepared = (_prepared(job, command, locks) for job, command in jobs)
        kinds: dict[object, list[Prepared]] = {}
        for run in prepared:
            if isinstance(run, str):
                print(run, file=sys.stderr)
            elif run is not None:
                kinds.setdefault(run.kind, []).append(run)
        arrays = []
        for number, runs in enumerate(kinds.values(), start=1):
            script = place / (f"array-{number}.sbatch" if len(kinds) > 1 else "array.sbatch")
            write_text_atomic(script, script_of(runs, script))
            is_submitted = runs[0].resolved.job.launch.submit
            job = slurm.submit(script) if is_submitted else ""
            for task, run in enumerate(runs if is_submitted else ()):
                _keep(run, [f"{job}_{task}" if len(runs) > 1 else job])
            arrays.append(Array(script, job, tuple(run.folder for run in runs)))
    return arrays


def _prepared(job: Job, command: CommandLine, locks: ExitStack) -> Prepared | str | None:
    """A run whose folder is ready and locked.

    Returns:
        Why it is not queued where it waits or runs already; None where nothing is left to do, which is said.
    """
    resolved = resolve(on_nodes(job), on_this_machine=False)
    if resolved.source is not None:
        # Whatever that run saves until this one is started.
        pinned = dataclasses.replace(resolved.job, load=str(resolved.source.checkpoint.path.resolve()))
        resolved = dataclasses.replace(resolved, job=pinned)
    folder = open_folder(resolved)
    if job.launch.submit and (why := _in_the_queue(folder)):
        return why
    locks.enter_context(RunLock.acquire(folder, command.typed()))
    # Another command may have queued it until a moment ago.
    if job.launch.submit and (why := _in_the_queue(folder)):
        return why
    report = checkpoints.repair(folder.checkpoints)
    for note in repair_notes(report, resolved.source):
        print(note, file=sys.stderr)
    if nothing_to_do(resolved, folder, first_iteration(resolved, report), command):
        return None
    make_ready(resolved, folder, report)
    return Prepared(resolved, folder, command)


def _in_the_queue(folder: RunFolder) -> str:
    """Which jobs of a run have not ended; empty where all have."""
    (waiting,) = queues_of([folder])
    listed = ", ".join(f"{number} {state}" for number, state in waiting.items())
    return f"{folder.path} is in the queue already: job {listed}" if waiting else ""


def _keep(run: Prepared, jobs: Sequence[str]) -> None:
    command, extra = run.command, run.command.source.extra_dir
    write_submitted(
        run.folder,
        Submitted(
            jobs=tuple(jobs),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            program=command.program,
            overrides=tuple(command.overrides),
            config_dir=None if extra is None else str(extra.resolve()),
            config_name=command.source.name,
        ),
    )


def _say(run: Prepared, jobs: Sequence[str]) -> None:
    job, folder, script = run.resolved.job, run.folder, str(run.folder.batch_script)
    if job.launch.output == "json":
        said = {"event": "submitted" if jobs else "written", "folder": str(folder.path), "script": script}
        print(json.dumps({**said, "jobs": list(jobs)}), flush=True)
        return
    ranks = f"{run.ranks_of_a_node} rank{'s' if run.ranks_of_a_node != 1 else ''}"
    print(f"  run      {folder.path}")
    print(f"  script   {script}: {job.launch.nnodes} x {ranks}")
    if jobs:
        print(f"  job      {', then '.join(jobs)}; squeue --jobs={','.join(jobs)}")
        print(f"  log      {folder.path}/slurm-{jobs[0]}.log")
    else:
        print(f"  next     sbatch {shlex.quote(script)}")
