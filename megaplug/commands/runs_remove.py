"""``action=remove``: the folders of runs are shown with their sizes, and with ``yes=true`` deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megaplug.commands.actions import Answer
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
    for folder in runs if sure else []:
        remove(folder, asked.command.typed())
    lines = [f"{folder.path}  {size_text(size)}" for folder, size in sizes.items()]
    several = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    if sure:
        lines.append(f"deleted: {several}, {size_text(sum(sizes.values()))}")
    else:
        lines.append(f"would be deleted: {several}, {size_text(sum(sizes.values()))}; nothing was")
        lines.append(f"  to delete them  {asked.command.typed('yes=true')}")
    found = [{"run": folder.name, "num_bytes": size} for folder, size in sizes.items()]
    return Answer({"runs": found, "deleted": sure}, "\n".join(lines))


def _size(path: Path) -> int:
    with disk_errors(path, "read"):
        return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def remove(folder: RunFolder, command: str) -> None:
    """Delete a run that no process uses. It loses its name first: what is half deleted is no run any more.

    Raises:
        UserError: A job is using it, or it cannot be deleted.
    """
    with RunLock.acquire(folder, command):
        going = folder.path.with_name(f".{folder.name}.removed-{os.getpid()}")
        with disk_errors(folder.path, "delete"):
            folder.path.rename(going)
            shutil.rmtree(going)
