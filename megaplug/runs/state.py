"""What has happened to a run, in its own words: exit codes do not tell the truth."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors, write_json_atomic

STATUSES = ("created", "running", "stopped", "finished", "failed")


@dataclass(frozen=True)
class RunState:
    """The content of ``state.json``.

    Attributes:
        status: ``created``, ``running``, ``stopped`` (can be continued), ``finished`` or ``failed``.
            ``running`` under a free lock means that the launcher was killed.
        iteration: The last training step that was seen; not all of it need have been saved.
        saved_iteration: The step of the last checkpoint that was reported as saved, 0 for none.
        iters: The step at which the run is finished.
        reason: Why it is so, for a person.
        rank: The rank that failed first.
        num_restarts: How often this start's ranks were started again after a failure.
        restart_reasons: Why, for a person.
        signal: The name of the signal that stopped it: ``SIGUSR2`` asks a scheduler to start it again.
        pid: The launcher.
        updated: ISO 8601, UTC; set by `write_state`.
    """

    status: str
    iteration: int = 0
    saved_iteration: int = 0
    iters: int = 0
    reason: str = ""
    rank: int | None = None
    num_restarts: int = 0
    restart_reasons: Sequence[str] = ()
    signal: str = ""
    pid: int | None = None
    updated: str = ""


def write_state(state_file: Path, state: RunState) -> RunState:
    """Write atomically, with the time and this process's id, and return what was written."""
    assert state.status in STATUSES, state.status
    written = replace(state, pid=os.getpid(), updated=datetime.now(UTC).isoformat(timespec="milliseconds"))
    write_json_atomic(state_file, asdict(written))
    return written


def read_state(state_file: Path) -> RunState | None:
    """The state of a run; None where none was ever written.

    Raises:
        UserError: If the file is not one that `write_state` has written.
    """
    with disk_errors(state_file, "read"):
        try:
            text = state_file.read_text(errors="replace")
        except FileNotFoundError:
            return None
    try:
        content: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(RunState)}
        state = RunState(**{key: value for key, value in content.items() if key in known})
        state = replace(state, restart_reasons=tuple(state.restart_reasons))
        if state.status not in STATUSES:
            raise ValueError(f"unknown status {state.status!r}")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{state_file} does not hold the state of a run: {error}",
            hint="remove that file; the checkpoints beside it still count",
        ) from error
    return state
