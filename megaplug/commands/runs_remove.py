"""``action=remove``: the folders of runs are shown with their sizes, and with ``yes=true`` deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megaplug.commands.actions import Answer
from megaplug.commands.runs_queue import queues_of
from megaplug.commands.runs_words import Asked
from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors, size_text
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import RunLock


def answer(asked: Asked) -> Answer:
    """What goes."""
    if "run" not in asked.typed:
        raise UserError("no run is named: nothing is deleted unless it is", hint="name one: run=FOLDER")
    runs, sure = asked.runs(), asked.typed.get("yes") == "true"
    for folder in runs:
        if folder.path.is_symlink():
            message = f"{folder.path} is a link to {folder.path.resolve()}: nothing is deleted"
            raise UserError(message, hint=f"run={folder.path.resolve()} deletes what it leads to")
    sizes = {folder: _size(folder.path) for folder in runs}
    refused: dict[RunFolder, UserError] = {}
    for folder in runs if sure else []:
        try:
            remove(folder, asked.command.typed())
        except UserError as error:
            if len(runs) == 1:
                raise
            refused[folder] = error
    named = [{"run": folder.name, "num_bytes": size} for folder, size in sizes.items()]
    sizes = {folder: size for folder, size in sizes.items() if folder not in refused}
    lines = [f"{folder.path}  {size_text(size)}" for folder, size in sizes.items()]
    lines += [f"not deleted: {folder.path}: {error.message}" for folder, error in refused.items()]
    several = "1 run" if len(sizes) == 1 else f"{len(sizes)} runs"
    if sure:
        lines.append(f"deleted: {several}, {size_text(sum(sizes.values()))}")
    else:
        lines.append(f"would be deleted: {several}, {size_text(sum(sizes.values()))}; nothing was")
        lines.append(f"  to delete them  {asked.command.typed('yes=true')}")
    reasons = {folder.name: error.message for folder, error in refused.items()}
    report = {"runs": named, "deleted": sure and not refused, "refused": reasons}
    return Answer(report, "\n".join(lines), 2 if refused else 0)


def _size(path: Path) -> int:
    with disk_errors(path, "read"):
        return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def remove(folder: RunFolder, command: str) -> None:
    """Delete a run that no process uses. It loses its name first: what is half deleted is no run any more.

    Raises:
        UserError: A job is using it or waits in the queue to go on with it, or it cannot be deleted.
    """
    with RunLock.acquire(folder, command):
        (queue,) = queues_of([folder])
        if queue:
            listed = ", ".join(f"{job} {state}" for job, state in queue.items())
            message = f"{folder.path} is in the queue: job {listed}"
            raise UserError(message, hint=f"take it out first: action=stop run={folder.path}")
        going = folder.path.with_name(f".{folder.name}.removed-{os.getpid()}")
        with disk_errors(folder.path, "delete"):
            folder.path.rename(going)
        # A run no more, whatever is left of it: who looks for that is told its name.
        with disk_errors(going, "delete all of"):
            shutil.rmtree(going)
