"""One job a folder: a lock that lasts as long as any process of the job lives, and not a moment longer.

It is ``flock`` on an open file. The ranks inherit it, so the lock outlives a launcher
that is killed, and it is gone when the last process is. It needs no time limit and is never stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors
from megaplug.runs.folder import RunFolder

_POLL_S = 0.01
# Whoever has just taken the lock writes its name; ranks without a launcher end themselves; and who asks how a
# run stands has its lock for a moment, though its file names the last launcher, which may live.
_UNNAMED_S, _ORPHANS_S, _LOOK_S = 1.0, 10.0, 0.1


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file tells.

    Attributes:
        pid: Process id of the launcher.
        host: The machine it runs on.
        since: ISO 8601, UTC.
        command: What was typed.
    """

    pid: int
    host: str
    since: str
    command: str


def read_holder(lock_file: Path) -> Holder | None:
    """Who took the lock last; None where that is not known. It may have ended since."""
    try:
        return Holder(**json.loads(lock_file.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # not yet written by the one who has just taken it: the caller says "another process"


class RunLock:
    """A held lock: `acquire` it, hand `fd` to the ranks, `release` it at the end (or leave the ``with``)."""

    def __init__(self, fd: int, path: Path, command: str = "") -> None:
        self.fd = fd
        self.path = path
        self.command = command

    @classmethod
    def acquire(
        cls, folder: RunFolder, command: str = "", *, beside: str = "start over beside it with resume=false"
    ) -> RunLock:
        """Take the lock of a run's folder, or say who has it.

        Where its launcher has gone, its ranks are waited for: they end within seconds.

        Args:
            folder: The run; its path must exist.
            command: What was typed, for whoever finds the lock taken.
            beside: What else can be done where it is taken.

        Raises:
            UserError: If another job holds the folder, or the file system knows no locks.
        """
        path = folder.lock_file
        with disk_errors(path, "open the lock"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with disk_errors(path, "lock"):
                began = time.monotonic()
                while not _flock(fd):
                    if time.monotonic() - began >= _patience(read_holder(path)):
                        raise _taken(folder, beside) from None
                    time.sleep(_POLL_S)
                holder = Holder(os.getpid(), socket.gethostname(), _now(), command)
                os.ftruncate(fd, 0)
                os.pwrite(fd, (json.dumps(asdict(holder)) + "\n").encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, command)

    def release(self) -> None:
        """Let go. Ranks that still live keep the lock: it is closed here, not undone for all."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _patience(holder: Holder | None) -> float:
    """Seconds for which a lock that is held may come free, or be found to be somebody else's."""
    if holder is None:
        return _UNNAMED_S
    return _ORPHANS_S if holder.host == socket.gethostname() and not _lives(holder.pid) else _LOOK_S


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _taken(folder: RunFolder, beside: str) -> UserError:
    holder = read_holder(folder.lock_file)
    if holder is None:
        return UserError(
            f"another process is using {folder.path}",
            hint=f"wait until it ends, or {beside}",
        )
    who = f"process {holder.pid} on {holder.host}, since {holder.since}"
    if holder.command:
        who += f" ({holder.command})"
    if holder.host == socket.gethostname() and not _lives(holder.pid):
        return UserError(
            f"ranks of a job whose launcher has gone are still using {folder.path} ({who})",
            hint=f"they end within seconds; if not, see which with: fuser -v {folder.lock_file}",
        )
    return UserError(
        f"another job is using {folder.path}: {who}",
        hint=f"wait until it ends or stop it with Ctrl-C, or {beside}",
    )


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
