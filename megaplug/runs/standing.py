"""How a run stands, from its folder alone: what it has said last, and whether any process of it lives."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import Holder, read_holder
from megaplug.runs.state import RunState, read_state

STANDINGS = (
    "created", "starting", "running", "ending", "stopped", "finished", "failed", "killed", "unreadable",
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        status: One of ``STANDINGS``. ``killed``: it says that it runs, and nobody does; ``starting`` and
            ``ending``: it says that it does not, and somebody has its lock.
        state: What it has said last; None where nothing was, or nothing that can be read.
        holder: Who has its lock; None where it is free.
        fault: Why it is ``unreadable``.
    """

    status: str
    state: RunState | None
    holder: Holder | None
    fault: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether a process of it lives, its launcher or ranks."""
        return self.status in ("starting", "running", "ending")


def standing(folder: RunFolder) -> Standing:
    """How a run stands now.

    Raises:
        UserError: Its folder cannot be read.
    """
    is_held = lock_is_held(folder.lock_file)
    holder = read_holder(folder.lock_file) if is_held else None
    try:
        state = read_state(folder.state_file)
    except UserError as error:
        return Standing("running" if is_held else "unreadable", None, holder, error.message)
    status = "created" if state is None else state.status
    if is_held:
        status = {"created": "starting", "running": "running"}.get(status, "ending")
    elif status == "running":
        status = "killed"
    return Standing(status, state, holder)


def lock_is_held(lock_file: Path) -> bool:
    """Whether a process of a run lives; asked without keeping the lock from anybody for long."""
    fd = _opened(lock_file)
    if fd is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def wait_until_free(lock_file: Path) -> None:
    """Return as soon as no process of a run lives."""
    fd = _opened(lock_file)
    if fd is None:
        return
    try:
        with disk_errors(lock_file, "lock"):
            fcntl.flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _opened(lock_file: Path) -> int | None:
    with disk_errors(lock_file, "open the lock"):
        try:
            return os.open(lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
