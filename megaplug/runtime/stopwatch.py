"""How long something took in all, and a word on what was being done when it failed."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self


class Stopwatch:
    """Adds up the seconds of wall clock spent inside ``with``.

    Args:
        note: Is added to an exception that leaves the block: what was being done.
    """

    def __init__(self, note: str) -> None:
        self.seconds = 0.0
        self.note = note
        self._began = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._began
        if error is not None:
            error.add_note(self.note)

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


data_wait = Stopwatch("while the next batch was read")
"""Waiting for the data loader, in ``batch.get_batch``."""
