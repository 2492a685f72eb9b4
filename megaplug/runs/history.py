"""``events.jsonl``: what has happened to a run over all its starts, one line each; nothing is cut from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaplug.runs.atomic import disk_errors, strict_json


def append_event(events_file: Path, event: Mapping[str, Any]) -> None:
    """Append one event: ``event`` (damage, start, failure, stall, restart or end), ``time`` and more.

    A line that a crash has torn keeps to itself.

    Raises:
        UserError: If the disk is full or may not be written to.
    """
    line = json.dumps(strict_json(event), allow_nan=False).encode() + b"\n"
    with disk_errors(events_file, "append to"), events_file.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        file.write(line if file.read(1) in (b"", b"\n") else b"\n" + line)


def read_events(events_file: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; one that was torn by a crash is left out."""
    with disk_errors(events_file, "read"):
        try:
            content = events_file.read_text(errors="replace")
        except FileNotFoundError:
            return []
    events = []
    for text in content.splitlines():
        try:
            event = json.loads(text)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
