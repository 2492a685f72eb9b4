"""``action=follow``: what a run records, or what one of its ranks writes, as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaplug.commands import cli
from megaplug.commands.actions import Answer
from megaplug.commands.runs_list import row_of
from megaplug.commands.runs_words import Asked
from megaplug.errors import UserError
from megaplug.launchers.screen import count
from megaplug.runs.atomic import disk_errors
from megaplug.runs.folder import RunFolder
from megaplug.runs.standing import standing

# Nothing tells of what another machine writes to a shared disk.
_POLL_S = 0.25
# Lines that are there already and are shown first.
_BEFORE = 10


def answer(asked: Asked) -> Answer:
    """Show what comes until the run ends; of one that has ended, what came last."""
    folder, rank = asked.run(), asked.rank()
    file = folder.metrics_file if rank is None else folder.log_file(rank)
    if rank is not None and not file.is_file():
        there = sorted(path.name for path in folder.logs.glob("rank*.log"))
        hint = f"there are {', '.join(there[:8])}" if there else "none of its ranks has written anything yet"
        raise UserError(f"{folder.name} has no log of rank {rank}", hint=hint)
    for line in _lines(folder, file):
        if rank is None:
            said = _step(line, as_json=asked.as_json)
        else:
            said = json.dumps({"event": "line", "rank": rank, "text": line}) if asked.as_json else line
        if said is not None and not cli.is_read(said):
            break
    row = row_of(folder)
    state = row.stands.state
    reason = f": {state.reason}" if state is not None and state.reason else ""
    text = f"{folder.name} is {row.stands.status} at step {row.iteration:,}{reason}"
    return Answer({"run": row.as_json([])}, text, is_last=True)


def _lines(folder: RunFolder, file: Path) -> Iterator[str]:
    """The last lines of a file, and those that are added to it while the run lives."""
    position, rest, first = 0, b"", True
    while True:
        # Asked before reading: what is written between the two is read in any case.
        is_alive = standing(folder).is_alive
        with disk_errors(file, "read"):
            size = file.stat().st_size if file.is_file() else 0
            if size < position:
                position, rest, first = 0, b"", True  # cut back, as a run does that goes on from a checkpoint
            content = b""
            if size > position:
                with file.open("rb") as opened:
                    opened.seek(position)
                    content = opened.read()
                position += len(content)
        *lines, rest = (rest + content).split(b"\n")
        if rest and not is_alive:
            lines.append(rest)
        for line in lines[-_BEFORE:] if first else lines:
            yield line.decode(errors="replace")
        if not is_alive:
            return
        first = False
        time.sleep(_POLL_S)


def _step(text: str, *, as_json: bool) -> str | None:
    """A line of ``metrics.jsonl``, for a program with the event as which training tells it.

    None for one that is torn, or says nothing that a person is shown.
    """
    try:
        line: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict):
        return None
    if as_json:
        return json.dumps({"event": "valid" if "valid_loss" in line else "step", **line})
    at = f"step {line.get('iteration', 0):>6,}"
    if line.get("valid_loss") is not None and "source" not in line:
        return f"{at}  {line.get('split', 'valid')} loss {line['valid_loss']:.4f}"
    if line.get("loss") is None:
        return None
    rate = line.get("tokens_per_second")
    return f"{at}  loss {line['loss']:.4f}" + (f"  {count(rate)} tokens/s" if rate is not None else "")
