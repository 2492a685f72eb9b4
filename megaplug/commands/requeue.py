"""Whether a run that a scheduler has stopped is to be queued again, and the word for its batch script."""

from __future__ import annotations

import os

from megaplug.launchers.slurm import REQUEUE, ask_to_be_queued_again, own_job
from megaplug.launchers.verdict import AT_ONCE, Outcome
from megaplug.runs.folder import RunFolder
from megaplug.runs.history import read_events

# Ctrl-C is a person's, who wants the run to end.
_OF_SCHEDULERS = ("SIGUSR2", "SIGTERM")


def queue_again(outcome: Outcome, folder: RunFolder, began: int) -> str:
    """Have a batch job's run queued again where a scheduler has stopped it, and that will help.

    Args:
        outcome: How it has ended.
        folder: The run.
        began: The step that it has begun from.

    Returns:
        A line for a person; empty where nothing is to be said.
    """
    by_scheduler = outcome.status == "stopped" and outcome.signal in _OF_SCHEDULERS
    if REQUEUE not in os.environ or not by_scheduler or outcome.kind == AT_ONCE:
        return ""
    if folder.ended_file(own_job(os.environ)).exists():
        return "not queued again: action=stop has ended its job"
    if outcome.saved_iteration <= began and _before_too(folder, began):
        beyond = f"beyond step {began:,}" if began else "at all"
        return f"not queued again: twice in a row nothing was saved {beyond}; is slurm.time too short?"
    ask_to_be_queued_again(os.environ[REQUEUE], outcome.reason)
    return "it is queued again, and goes on in the same folder"


def _before_too(folder: RunFolder, began: int) -> bool:
    """Whether the start before this one has begun from the same step."""
    starts = [event for event in read_events(folder.events_file) if event["event"] == "start"]
    return len(starts) > 1 and starts[-2].get("iteration") == began
