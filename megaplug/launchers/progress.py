"""What is seen while a job runs: rich on a terminal, plain lines elsewhere, JSON lines, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from megaplug.launchers.screen import Header, Summary
from megaplug.launchers.track import Track, event_text
from megaplug.runs.atomic import strict_json

MODES = ("auto", "rich", "plain", "none")
_EVERY_S = 10.0


class Progress:
    """``logging.progress=none``: nothing but the summary. The others build on it.

    Args:
        track: Takes every event.
        stream: Where to write.
    """

    def __init__(self, track: Track, stream: TextIO) -> None:
        self.track = track
        self.stream = stream

    def header(self, header: Header) -> None:
        """Show what is about to run."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event; hand this to `local.run` as ``on_event``."""
        self.track.take(event)

    def note(self, text: str) -> None:
        """Show a line of our own, such as what a run resumes from."""
        self.event({"event": "note", "text": text})

    def close(self) -> None:
        """End the progress line. Nothing happens at a second call."""

    def summary(self, summary: Summary) -> None:
        """End the progress line and show what has come of the run."""
        self.close()
        for line in summary.lines():
            self._print(line)

    def _print(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlainProgress(Progress):
    """Lines for a file or a pipe: the first step, then one each tenth of the way and each 10 s.

    Args:
        track: Takes every event.
        stream: Where to write.
        clock: Seconds that only ever grow.
    """

    def __init__(self, track: Track, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(track, stream)
        self._clock = clock
        self._begin = track.iteration
        self._shown_at: float | None = None
        self._shown_tenth = 0

    def header(self, header: Header) -> None:
        """One line a row."""
        for line in header.lines():
            self._print(line)

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event and print a line where it is time for one."""
        phase = self.track.phase
        super().event(event)
        text = event_text(event)
        if text is not None:
            self._print(text)
        elif event["event"] == "phase" and self.track.phase != phase:
            self._print(f"{self.track.phase} ...")
        elif event["event"] == "step" and self._is_time():
            self._print(self.track.step_text())

    def _is_time(self) -> bool:
        now = self._clock()
        done, span = self.track.iteration - self._begin, max(1, self.track.iters - self._begin)
        tenth = 10 * done // span
        if self._shown_at is not None and tenth == self._shown_tenth and now - self._shown_at < _EVERY_S:
            return False
        self._shown_at, self._shown_tenth = now, tenth
        return True


class JsonProgress(Progress):
    """``launch.output=json``: one object a line, each with an ``event``; NaN becomes null."""

    def header(self, header: Header) -> None:
        """One object."""
        self._object(header.as_json())

    def event(self, event: Mapping[str, Any]) -> None:
        """The event as it came."""
        super().event(event)
        self._object(event)

    def summary(self, summary: Summary) -> None:
        """The last object."""
        self._object(summary.as_json())

    def _object(self, content: Mapping[str, Any]) -> None:
        self._print(json.dumps(strict_json(content), allow_nan=False))


def make_progress(
    mode: str, output: str, iters: int, iteration: int = 0, stream: TextIO | None = None
) -> Progress:
    """The display for a run.

    Args:
        mode: ``auto`` (rich on a terminal, else plain), ``rich``, ``plain``, or ``none`` (the summary only).
        output: ``text`` or ``json``; JSON overrides the mode.
        iters: The step at which the run is finished or stops for now.
        iteration: The step it starts from.
        stream: Where to write; stdout where not given.
    """
    assert mode in MODES and output in ("text", "json"), (mode, output)
    stream = stream or sys.stdout
    track = Track(iters, iteration)
    if output == "json":
        return JsonProgress(track, stream)
    if mode == "none":
        return Progress(track, stream)
    if mode == "rich" or (mode == "auto" and stream.isatty()):
        from megaplug.launchers.rich_progress import RichProgress

        return RichProgress(track, stream)
    return PlainProgress(track, stream)
