"""SLURM's commands and variables: a job is submitted, looked up, and asked to be queued again."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megaplug.errors import UserError
from megaplug.runs.atomic import write_text_atomic

REQUEUE = "MEGAPLUG_REQUEUE"
"""Names the file that a launcher makes in a batch job to have the run queued again."""
_ANSWERS_S = 60.0
_NO_SUCH_JOB = re.compile(r"Invalid job id", re.IGNORECASE)


def node_of_step(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """How many nodes the step has that this process is a task of, and which this one is; None outside."""
    number, node = environ.get("SLURM_STEP_NUM_NODES"), environ.get("SLURM_NODEID")
    return None if number is None or node is None else (int(number), int(node))


def own_job(environ: Mapping[str, str]) -> str:
    """The number of the job that this process is in, as `queued` names it; empty outside."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Queue a batch script.

    Args:
        script: It.
        options: Of sbatch, beside those in the script.

    Returns:
        The job's number.

    Raises:
        UserError: There is no SLURM here, or it refuses the job; its own words say why.
    """
    done = _asked(["sbatch", "--parsable", *options, str(script)])
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise UserError(f"SLURM refuses the job: {said}", hint=f"it was given {script}", exit_code=1)
    return done.stdout.strip().partition(";")[0]


def queued(jobs: Sequence[str]) -> dict[str, str]:
    """Which of some jobs SLURM has not ended, each with its state such as ``PENDING (Priority)``.

    Raises:
        UserError: There is no SLURM here, or it does not answer.
    """
    if not jobs:
        return {}
    done = _asked(["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={','.join(jobs)}"])
    if done.returncode:
        # Of one that has long ended, and only of one, it says so.
        if _NO_SUCH_JOB.search(done.stderr):
            return {}
        raise UserError(f"squeue does not answer: {' '.join(done.stderr.split())}", exit_code=1)
    rows = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    return {job: state if reason in ("None", "") else f"{state} ({reason})" for job, state, reason in rows}


def end(jobs: Mapping[str, str]) -> None:
    """Take jobs out of the queue; what runs in one is told to save and end, and ends it.

    By SIGTERM, which cuts no save short however often it comes. Whoever asks for this leaves word that the
    job is not to be queued again (`megaplug.runs.submitted.mark_ended`).

    Args:
        jobs: As `queued` has found them.

    Raises:
        UserError: There is no SLURM here, or it refuses.
    """
    running = [job for job, state in jobs.items() if state.startswith("RUNNING")]
    waiting = [job for job in jobs if job not in running]
    # What waits for the end of another must be gone by then.
    if waiting:
        cancel(waiting)
    if running:
        _cancel("--signal=TERM", *running)


def cancel(jobs: Iterable[str]) -> None:
    """Take jobs out of the queue, whatever runs in them.

    Raises:
        UserError: There is no SLURM here, or it refuses.
    """
    _cancel(*jobs)


def _cancel(*words: str) -> None:
    done = _asked(["scancel", *words])
    if done.returncode:
        raise UserError(f"scancel refuses: {' '.join(done.stderr.split())}", exit_code=1)


def ask_to_be_queued_again(place: str, why: str) -> None:
    """Leave word for the batch script that this run is to go on.

    Args:
        place: What `REQUEUE` says.
        why: For whoever finds the file.
    """
    write_text_atomic(Path(place), f"{why}\n")


def _asked(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which(words[0]) is None:
        raise UserError(
            f"there is no {words[0]} here",
            hint="submit on a machine of the cluster, or launch.submit=false only writes the script",
        )
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_ANSWERS_S, check=False)
    except subprocess.TimeoutExpired as error:
        message = f"{words[0]} has not answered within {_ANSWERS_S:g} s"
        raise UserError(message, hint="is SLURM's controller up? sinfo", exit_code=1) from error
