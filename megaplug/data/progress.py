"""How far the preparation is: a bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from megaplug.data.cache import say

_SILENT_S = 2.0
_BETWEEN_LINES_S = 5.0


class Progress(Protocol):
    """What is told while data is prepared, stage by stage."""

    def stage(self, name: str, size: int) -> None:
        """A stage of ``size`` bytes begins."""

    def advance(self, num_bytes: int) -> None:
        """So many bytes more of the stage are done."""


class Silence:
    """Tells nothing."""

    def stage(self, name: str, size: int) -> None:
        """See `Progress`."""

    def advance(self, num_bytes: int) -> None:
        """See `Progress`."""


class PlainLines:
    """A line when it has taken two seconds, then one every five.

    Args:
        tell: Takes a line.
        clock: Seconds.
    """

    def __init__(
        self, tell: Callable[[str], None] = say, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._next = clock() + _SILENT_S
        self._name, self._size, self._done, self._since = "", 0, 0, 0.0

    def stage(self, name: str, size: int) -> None:
        """See `Progress`."""
        self._name, self._size, self._done, self._since = name, size, 0, self._clock()
        self.advance(0)

    def advance(self, num_bytes: int) -> None:
        """See `Progress`."""
        self._done += num_bytes
        now = self._clock()
        if now >= self._next:
            self._next = now + _BETWEEN_LINES_S
            self._tell(f"{self._name}: {self._figures(now - self._since)}")

    def _figures(self, seconds: float) -> str:
        if not self._size:
            return "..."
        share = f"{self._done / self._size:.0%} of {self._size / 1e6:,.1f} MB"
        if not self._done or seconds <= 0:
            return share
        rate = self._done / seconds
        return f"{share}, {rate / 1e6:,.1f} MB/s, {max(0, self._size - self._done) / rate:,.0f} s left"


@contextlib.contextmanager
def progress(show: bool | None, about: str = "data") -> Iterator[Progress]:
    """The progress for this terminal.

    Args:
        show: False for none; True and None for a bar where stderr is a terminal, and lines where it is not.
        about: What every line begins with.
    """
    if show is False:
        yield Silence()
    elif sys.stderr.isatty():
        with _bar(about) as bar:
            yield bar
    else:
        yield PlainLines(functools.partial(_say, about))


def _say(about: str, line: str) -> None:
    print(f"{about}: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(about: str) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn(f"{about}: {{task.description}}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("")

        class Bar:
            def stage(self, name: str, size: int) -> None:
                shown.reset(task, description=name, total=size or None)

            def advance(self, num_bytes: int) -> None:
                shown.advance(task, num_bytes)

        yield Bar()
