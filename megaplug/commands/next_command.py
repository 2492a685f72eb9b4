"""What can be typed after a run has ended, with what it does."""

from __future__ import annotations

from megaplug.commands.cli import CommandLine
from megaplug.launchers.verdict import Outcome
from megaplug.runs import checkpoints
from megaplug.runs.early_stop import EARLY_STOP
from megaplug.runs.folder import RunFolder

# What a person has to do before the same command helps, by the kind of the failure.
_ONCE = {
    "disk": "once the disk takes it",
    "memory": "with one of the changes above",
    "missing": "on every node",
}


def next_command(
    outcome: Outcome,
    folder: RunFolder,
    command: CommandLine,
    iters: int,
    *,
    comes_again: bool = False,
    changed: str = "",
) -> str:
    """The command that follows an end.

    Args:
        outcome: The end.
        folder: The run.
        command: What was typed.
        iters: The steps of the whole run.
        comes_again: Whether that, unchanged, would come to the same end.
        changed: What would not, where that is known.
    """
    early = outcome.reason.startswith(EARLY_STOP) and outcome.iteration < iters
    if outcome.status == "finished" and early:
        return past_early_stop(command)
    if outcome.status == "finished":
        typed = command.typed("-resume", f"load={folder.path}")
        return f"{typed}   # trains on from these weights, under any topology"
    if outcome.reason == "train.stop_at":
        return f"{command.typed('-train.stop_at', '-resume')}   # goes on"
    once = ""
    if outcome.status == "failed" and comes_again:
        if changed:
            return changed
        once = f"{_ONCE.get(outcome.kind, 'once that is mended')}: "
    return f"{command.typed('-resume')}   # {once}{goes_on_from(outcome, folder)}"


def goes_on_from(outcome: Outcome, folder: RunFolder) -> str:
    """Where a command that follows begins."""
    if outcome.saved_iteration:
        return f"goes on from step {outcome.saved_iteration:,}"
    if checkpoints.has_set_aside(folder.checkpoints):
        return "starts again: no checkpoint is whole, see its set_aside/"
    return "starts again: nothing was saved"


def past_early_stop(command: CommandLine) -> str:
    """The command that trains on where `megaplug.runs.early_stop` has ended a run."""
    return f"{command.typed('-resume', 'train.early_stop_patience=null')}   # goes on"
