"""The ranks of a job on one machine, as their supervisor sees them: on its own, or behind a socket."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from megaplug.launchers import stacks
from megaplug.launchers.logs import count_oom_kills, hint_for, log_tail
from megaplug.launchers.ranks import LocalRank, Rank, Share, kill_group, start_ranks
from megaplug.launchers.stacks import Stand
from megaplug.runs.folder import RunFolder

Event = dict[str, Any]


@dataclass(frozen=True)
class News:
    """Something that has happened.

    Attributes:
        rank: To which rank; None where it is the whole machine's.
        event: What the rank has said; None where it has ended, and its ``exit_code`` is known.
    """

    rank: Rank | None
    event: Event | None


@dataclass(frozen=True)
class LastWords:
    """What a rank that has failed leaves behind.

    Attributes:
        lines: The last of its log.
        hint: What they suggest.
    """

    lines: tuple[str, ...] = ()
    hint: str = ""


class Crew(Protocol):
    """The ranks of one machine."""

    @property
    def ranks(self) -> Sequence[Rank]:
        """In the order of their numbers; empty before `start`."""

    def start(self, share: Share, listener: socket.socket | None) -> None:
        """Start the ranks, as `start_ranks` does.

        Raises:
            UserError: They cannot be started.
        """

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Register all that may bring news, with this crew as data."""

    def news(self, selector: selectors.BaseSelector, fd: int) -> list[News]:
        """What has happened, as a registered descriptor has become readable."""

    def last_news(self) -> list[News]:
        """What was said and not heard yet."""

    def is_stopped(self, rank: Rank) -> bool:
        """Whether a rank was stopped by SIGSTOP or its like."""

    def signal(self, number: int) -> None:
        """Send a signal to every rank that lives."""

    def ask(self, ranks: Sequence[Rank], wait_s: float) -> Callable[[], dict[int, Stand]]:
        """Ask where some of its ranks stand, see `stacks.ask`; returns what waits for the answer."""

    def last_words(self, rank: Rank, reason: str) -> LastWords:
        """Of a rank that has failed, for the given reason."""

    def end(self, wait_s: float) -> Callable[[], list[str]]:
        """Have what lives killed.

        Returns:
            What waits until it is gone, and names what still is there after so many seconds. So all machines
            are told before the first is waited for.
        """


class LocalCrew:
    """Those of this machine.

    Args:
        command: What each rank executes.
        folder: The run.
        lock_fd: Of the run's lock; None where another machine holds it.
        environment: For all ranks.
    """

    def __init__(
        self, command: Sequence[str], folder: RunFolder, lock_fd: int | None, environment: Mapping[str, str]
    ) -> None:
        self.ranks: list[LocalRank] = []
        self._command = command
        self._folder = folder
        self._lock_fd = lock_fd
        self._environment = environment
        self._parent_fd = -1
        self._oom_kills = count_oom_kills()

    def start(self, share: Share, listener: socket.socket | None) -> None:
        """Start the ranks; they end when this process does."""
        parent_read, self._parent_fd = os.pipe()
        try:
            start_ranks(
                self.ranks,
                self._command,
                self._folder,
                share,
                listener,
                parent_read,
                self._lock_fd,
                self._environment,
            )
        finally:
            os.close(parent_read)

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Register the processes and their pipes."""
        for rank in self.ranks:
            selector.register(rank.pidfd, selectors.EVENT_READ, self)
            selector.register(rank.events_fd, selectors.EVENT_READ, self)

    def news(self, selector: selectors.BaseSelector, fd: int) -> list[News]:
        """What a rank has said, or that it has ended: what it said before comes first."""
        rank = next(rank for rank in self.ranks if fd in (rank.pidfd, rank.events_fd))
        if fd == rank.pidfd:
            selector.unregister(rank.pidfd)
            rank.look_at_exit()
        found = [News(rank, event) for event in rank.read_events()]
        if fd == rank.pidfd:
            found.append(News(rank, None))
        if rank.events_ended and rank.events_fd in selector.get_map():
            selector.unregister(rank.events_fd)
        return found

    def last_news(self) -> list[News]:
        """What is left in the pipes."""
        return [News(rank, event) for rank in self.ranks for event in rank.read_events()]

    def is_stopped(self, rank: Rank) -> bool:
        """As the kernel says."""
        return stacks.is_stopped(self._own(rank).process.pid)

    def signal(self, number: int) -> None:
        """Send it to every process that lives."""
        for rank in self.ranks:
            if rank.exit_code is None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(rank.pidfd, number)

    def ask(self, ranks: Sequence[Rank], wait_s: float) -> Callable[[], dict[int, Stand]]:
        """Have them write their stacks, once that is waited for."""
        return partial(stacks.ask, [self._own(rank) for rank in ranks], wait_s)

    def last_words(self, rank: Rank, reason: str) -> LastWords:
        """From its log."""
        own = self._own(rank)
        lines = log_tail(own.log, own.log_start)
        killed = count_oom_kills() - self._oom_kills
        return LastWords(lines, hint_for((*lines, reason), rank.exit_code, killed, self._folder.path))

    def end(self, wait_s: float) -> Callable[[], list[str]]:
        """Kill the whole process group, once that is waited for."""
        return partial(self._end, wait_s)

    def _end(self, wait_s: float) -> list[str]:
        left = kill_group(self.ranks, wait_s)
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
            self._parent_fd = -1
        return [f"process {pid}" for pid in left]

    def _own(self, rank: Rank) -> LocalRank:
        assert isinstance(rank, LocalRank)
        return rank
