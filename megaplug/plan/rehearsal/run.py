"""Runs rehearsals in a process of their own, since they change torch for the whole process.

Nothing is written to a disk, and no process outlives this one, whatever ends it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

from megaplug.errors import UserError
from megaplug.job.schema import Job
from megaplug.job.variables import CONNECTIONS
from megaplug.plan.rehearsal.frozen import freeze, rehearsed_job
from megaplug.plan.rehearsal.result import RankRehearsal
from megaplug.runs.helper_output import content, in_memory, last_words


def rehearse(job: Job, ranks: Sequence[int]) -> Generator[RankRehearsal]:
    """Rehearse ranks of a job.

    Args:
        job: A job that can exist.
        ranks: Which of its ranks.

    Returns:
        Them in this order, each as soon as it is done. Close the iterator to end the others.

    Raises:
        UserError: The job cannot be rehearsed, or a rank failed to.
    """
    yield from rehearse_all([(job, rank) for rank in ranks])


def rehearse_all(wanted: Sequence[tuple[Job, int]], *, origins: bool = False) -> Generator[RankRehearsal]:
    """As :func:`rehearse`, for ranks of several jobs: torch and Megatron are imported once.

    Args:
        wanted: Jobs, each with one of its ranks.
        origins: Whether the results say who made what was there at the peak, which takes a few times longer.
    """
    # Files in memory: a job may be longer than what a pipe holds, and so may what libraries print.
    with in_memory("asked") as asked, in_memory("said") as said:
        texts: dict[int, str] = {}
        for job, rank in wanted:
            text = texts.get(id(job)) or freeze(rehearsed_job(job))
            texts[id(job)] = text
            asked.write(json.dumps({"job": text, "rank": rank, "origins": origins}) + "\n")
        asked.seek(0)
        command = [sys.executable, "-m", "megaplug.runtime.rehearsal", str(os.getpid())]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=asked, stdout=pipe, stderr=said, text=True, env=_environment()
        ) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    values = json.loads(line)
                    if "failed" in values:
                        raise _failure(**values["failed"])
                    yield RankRehearsal.from_dict(values)
                code = child.wait()
            finally:
                # Its forks end with it. Where all is told it has ended, and this does nothing.
                child.kill()
        if code:
            raise _failure(status=code, said=last_words(content(said)))


def _failure(
    rank: int | None = None, status: int = 1, said: str = "", message: str = "", hint: str = ""
) -> UserError:
    """What is told of a rank, or of the process of all of them, that could not do its work."""
    of = "" if rank is None else f" of rank {rank}"
    if message:
        return UserError(f"the rehearsal{of} failed: {message}", hint=hint, exit_code=1)
    if status == -signal.SIGKILL or said.endswith("MemoryError"):
        cores = len(os.sched_getaffinity(0))
        return UserError(
            f"the rehearsal{of} was ended, probably for want of memory",
            hint=f"free some of this machine's; {cores} at a time are rehearsed, a rank on each core: "
            "`taskset -c 0` before the command makes it one",
            exit_code=1,
        )
    if status < 0:
        return UserError(f"the rehearsal{of} was ended by {signal.Signals(-status).name}", exit_code=1)
    return UserError(f"the rehearsal{of} failed; its last words:\n{said}", exit_code=1)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    # A rehearsal computes nothing that threads could share, and has no GPU whose queues would matter.
    kept = {name: value for name, value in os.environ.items() if name != CONNECTIONS}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
