"""What SLURM knows of runs that were submitted to it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from megaplug.errors import UserError
from megaplug.launchers import slurm
from megaplug.runs.folder import RunFolder
from megaplug.runs.submitted import read_submitted

Queue = dict[str, str]
"""The state of each job that has not ended, by its number."""


def queues_of(folders: Sequence[RunFolder], faults: list[str] | None = None) -> list[Queue]:
    """For each run the jobs that SLURM has not ended; none where there is no SLURM.

    Args:
        folders: The runs.
        faults: Gets why runs do not say which jobs are their own, which are then without any; None to raise.

    Raises:
        UserError: SLURM does not answer, or a run does not say which jobs are its own.
    """
    own = [_jobs_of(folder, faults) for folder in folders]
    everything = [job for jobs in own for job in jobs]
    if not everything or shutil.which("squeue") is None:
        return [{} for _ in folders]
    states = slurm.queued(everything)
    return [{job: states[job] for job in jobs if job in states} for jobs in own]


def _jobs_of(folder: RunFolder, faults: list[str] | None) -> tuple[str, ...]:
    try:
        found = read_submitted(folder)
    except UserError as error:
        if faults is None:
            raise
        faults.append(error.message)
        return ()
    return () if found is None else found.jobs
