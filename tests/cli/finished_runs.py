"""Stands for training: what a run of four steps leaves in its folder."""

from __future__ import annotations

from megaplug.commands.readiness import open_folder
from megaplug.commands.resolved import resolve
from megaplug.job.schema import Job
from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import append_metrics
from megaplug.runs.state import RunState, write_state


def finish(job: Job, **last: float) -> RunFolder:
    """The folder of a run that has done all its steps.

    Args:
        job: Its job.
        last: Further figures of the last step.
    """
    folder = open_folder(resolve(job))
    folder.job_file.write_text(f"job:\n  lr:\n    lr: {job.lr.lr}\n")
    for step in range(1, 5):
        append_metrics(folder.metrics_file, {"iteration": step, "loss": 5 / step, "tokens": 100 * step})
    if last:
        append_metrics(folder.metrics_file, {"iteration": 4, **last})
    write_state(folder.state_file, RunState("finished", 4, 4, 4))
    return folder
