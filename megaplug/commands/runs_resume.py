"""``action=resume``: a run goes on by the command that started it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from megaplug.commands.actions import Answer
from megaplug.commands.runs_list import row_of
from megaplug.commands.runs_words import Asked
from megaplug.errors import UserError
from megaplug.job.differences import read_keys
from megaplug.runs.folder import RunFolder, find_latest
from megaplug.runs.history import read_events
from megaplug.runs.standing import standing

_TRAIN = ("megaplug-train", "train.py")


def answer(asked: Asked) -> Answer:
    """Start it, and wait for its end."""
    from megaplug.commands import train

    folder = RunFolder(asked.run().path.resolve())
    stands = standing(folder)
    if stands.is_alive:
        message = f"{folder.name} is {stands.status} already"
        raise UserError(message, hint=f"{asked.command.typed('action=follow')} shows its steps")
    words, place = _started_by(folder)
    _find_again(folder, place)
    os.chdir(place)
    code = train.main([*words, "launch.output=json"] if asked.as_json else words)
    row = row_of(folder)
    said = f"{folder.name} is {row.stands.status} at step {row.iteration:,}"
    return Answer({"run": row.as_json([]), "exit_code": code}, said, code, is_last=True)


def _started_by(folder: RunFolder) -> tuple[list[str], Path]:
    """The words of the training command, and the folder in which it was typed.

    Only the words are taken, for this program's own training command: a folder that came from somebody else
    names no other program.

    Raises:
        UserError: It is not known.
    """
    starts = [event for event in read_events(folder.events_file) if event["event"] == "start"]
    last = starts[-1] if starts else {}
    try:
        typed = shlex.split(str(last.get("command", "")))
    except ValueError:
        typed = []  # a quotation without an end: no command of ours
    programs = [number for number, word in enumerate(typed[:2]) if Path(word).name in _TRAIN]
    if not programs:
        message = f"{folder.name} does not say which command started it last"
        raise UserError(message, hint="type that command again")
    place = Path(str(last.get("cwd", ".")))
    if not place.is_dir():
        message = f"{folder.name} was started in {place}, which is not there"
        raise UserError(message, hint="type its command again")
    words = typed[programs[0] + 1 :]
    # resume=false was meant for that start: said again, it would start over.
    return [word for word in words if word.partition("=")[0].lstrip("+") != "resume"], place


def _find_again(folder: RunFolder, place: Path) -> None:
    """See that its command goes on with this folder: not if it was moved, or a newer one has been begun.

    Raises:
        UserError: It would go on with another, or begin one.
    """
    keys = read_keys(folder.job_file) or {}
    name = str(keys.get("name", ""))
    digest = folder.name.removeprefix(f"{name}-").partition("-")[0]
    newest = find_latest(place / str(keys.get("runs_dir", "")), name, digest) if name else None
    if newest is None or newest.path.resolve() != folder.path:
        where = "a new folder" if newest is None else newest.path.resolve()
        message = f"the command that started {folder.path} would go on with {where}"
        raise UserError(message, hint=f"to begin another run with it: load={folder.path} load_state=all")
