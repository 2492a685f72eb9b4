"""The ranks of a job as processes of this machine: one group, watched without reaping, killed as a group."""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors
from megaplug.runs.events import EVENTS_FD, PARENT_FD, STACK_FD, STORE_FD, parse_event
from megaplug.runs.folder import RunFolder

_MAX_PENDING = 1 << 20  # bytes of an unfinished line: a rank that floods the pipe does not fill our memory


@dataclass
class Rank:
    """What is known of a rank, wherever it runs.

    Attributes:
        rank: Its number.
        end: Its ``end`` event.
        exit_code: As `subprocess` counts: negative for a signal; None while it lives, and where it has lived
            until the whole group was killed.
        peak_bytes: The most memory that it has said it had used.
        can_save: It has done a step, and saves when it is told to stop.
    """

    rank: int
    end: dict[str, Any] | None = field(default=None, kw_only=True)
    exit_code: int | None = field(default=None, kw_only=True)
    peak_bytes: int = field(default=0, kw_only=True)
    can_save: bool = field(default=False, kw_only=True)


@dataclass
class LocalRank(Rank):
    """A rank whose process is this one's child.

    Attributes:
        process: Never polled before the end: unreaped, it keeps the process group's number from being reused.
        pidfd: Becomes readable when the process has ended.
        events_fd: Read end of its event pipe.
        stack_fd: A file in memory to which it writes its stack when it is asked.
        events_ended: Nobody holds the write end any more.
        log: Where its output goes.
        log_start: The byte at which this start begins in the log.
    """

    process: subprocess.Popen[bytes]
    pidfd: int
    events_fd: int
    log: Path
    log_start: int
    stack_fd: int
    events_ended: bool = False
    pending: bytes = field(default=b"", repr=False)

    def read_events(self) -> list[dict[str, Any]]:
        """The events that have arrived since the last call."""
        while not self.events_ended:
            try:
                chunk = os.read(self.events_fd, 65536)
            except BlockingIOError:
                break
            self.events_ended = not chunk
            self.pending = (self.pending + chunk)[-_MAX_PENDING:]
        *lines, self.pending = self.pending.split(b"\n")
        events = [event for line in lines if (event := parse_event(line)) is not None]
        return [{**event, "rank": self.rank} for event in events]

    def look_at_exit(self) -> None:
        """Take note of how the process has ended, and leave it unreaped."""
        status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if status is not None:
            self.exit_code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def close(self) -> None:
        """Reap the process, which has been killed, and close what was open for it."""
        self.process.wait()
        for fd in (self.pidfd, self.events_fd, self.stack_fd):
            os.close(fd)


@dataclass(frozen=True)
class Share:
    """The ranks of a job that one machine runs, and where all ranks meet.

    Attributes:
        world_size: Number of ranks of the whole job.
        first: The first of those here; the others follow it.
        number: How many there are here.
        address: Of rank 0, as it is reached from here.
        port: At which its store listens.
        shift: The first rank here takes the device of this number, the next the next, and so on round.
    """

    world_size: int
    first: int
    number: int
    address: str
    port: int
    shift: int = 0


def start_ranks(
    ranks: list[LocalRank],
    command: Sequence[str],
    folder: RunFolder,
    share: Share,
    listener: socket.socket | None,
    parent_fd: int,
    lock_fd: int | None,
    environment: Mapping[str, str],
) -> None:
    """Start every rank of a share, appending each to ``ranks`` as soon as it lives, so that it can be ended.

    Args:
        ranks: Empty; filled here.
        command: The same for all; what differs is in the environment.
        folder: The run.
        share: Which ranks.
        listener: Bound to the master port, for rank 0 to inherit; None where that is elsewhere.
        parent_fd: Read end of the pipe whose write end only this process holds.
        lock_fd: Inherited by all, so that the lock lasts as long as they do.
        environment: For all ranks; what names the rank is added here.

    Raises:
        UserError: If a log file cannot be written or the command cannot be started.
    """
    with disk_errors(folder.logs, "write logs in"):
        folder.logs.mkdir(parents=True, exist_ok=True)
    for local in range(share.number):
        rank = share.first + local
        events_read, events_write = os.pipe()
        os.set_blocking(events_read, False)
        stack_fd = os.memfd_create(f"stack{rank}")
        environ = {
            **environment,
            "MASTER_ADDR": share.address,
            "RANK": str(rank),
            "LOCAL_RANK": str((local + share.shift) % share.number),
            "WORLD_SIZE": str(share.world_size),
            "LOCAL_WORLD_SIZE": str(share.number),
            "MASTER_PORT": str(share.port),
            EVENTS_FD: str(events_write),
            PARENT_FD: str(parent_fd),
            STACK_FD: str(stack_fd),
        }
        environ.pop(STORE_FD, None)
        fds = [events_write, parent_fd, stack_fd]
        if lock_fd is not None:
            fds.append(lock_fd)
        if rank == 0 and listener is not None:
            environ[STORE_FD] = str(listener.fileno())
            fds.append(listener.fileno())
        log = folder.log_file(rank)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with disk_errors(log, "write"), log.open("ab") as output:
                output.write(f"=== {now} rank {rank} of {share.world_size}: {shlex.join(command)}\n".encode())
                output.flush()
                log_start = output.tell()
                try:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environ,
                        pass_fds=fds,
                        process_group=ranks[0].process.pid if ranks else 0,
                    )
                except OSError as error:
                    raise UserError(f"cannot start rank {rank}: {error.strerror}: {command[0]}") from error
        except BaseException:
            os.close(events_read)
            os.close(stack_fd)
            raise
        finally:
            os.close(events_write)
        pidfd = os.pidfd_open(process.pid)
        ranks.append(LocalRank(rank, process, pidfd, events_read, log, log_start, stack_fd))


def kill_group(ranks: Sequence[LocalRank], wait_s: float) -> list[int]:
    """SIGKILL everything in the ranks' process group, wait until it is gone, and reap the ranks.

    Returns:
        Ids of processes that still live after ``wait_s`` seconds (stuck in the kernel); nearly always none.
    """
    if not ranks:
        return []
    group = ranks[0].process.pid
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    # A process with a kill pending cannot fork, so whoever is in the group now is all there is to wait for.
    left = _wait_gone(_members(group), time.monotonic() + wait_s)
    for rank in ranks:
        if rank.process.pid not in left:
            rank.close()
    return left


def _members(group: int) -> list[int]:
    """Processes of a group that have not ended yet."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # pid (name) state ppid pgrp ...: the name may hold anything, its last parenthesis ends it.
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state not in "ZX":
            members.append(int(entry.name))
    return members


def _wait_gone(pids: Sequence[int], deadline: float) -> list[int]:
    waiting: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                waiting[os.pidfd_open(pid)] = pid
        for fd in waiting:
            selector.register(fd, selectors.EVENT_READ)
        while waiting and (rest := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(rest):
                selector.unregister(key.fd)
                os.close(key.fd)
                del waiting[key.fd]
    for fd in waiting:
        os.close(fd)
    return list(waiting.values())
