"""The progress of a run on a terminal: a spinner before the first step, then one line that moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from megaplug.launchers.progress import Progress
from megaplug.launchers.screen import Header, Summary
from megaplug.launchers.track import Track, event_text

_COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red"}


class RichProgress(Progress):
    """A live line at the bottom; what must not be lost is printed above it.

    Args:
        track: Takes every event.
        stream: A terminal.
        console: Another console, for tests.
    """

    def __init__(self, track: Track, stream: TextIO, console: Console | None = None) -> None:
        super().__init__(track, stream)
        self._console = console or Console(file=stream, force_terminal=True, highlight=False)
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def header(self, header: Header) -> None:
        """Labels in bold."""
        width = max((len(label) for label, _ in header.rows), default=0)
        for label, value in header.rows:
            self._console.print(Text.assemble("  ", (f"{label:<{width}}", "bold"), "  ", value))

    def event(self, event: Mapping[str, Any]) -> None:
        """Move the line."""
        super().event(event)
        if (text := event_text(event)) is not None:
            self._console.print(Text(text))
        if self._live is None:
            self._live = Live(
                get_renderable=self._line, console=self._console, refresh_per_second=8, redirect_stderr=False
            )
            self._live.start()

    def close(self) -> None:
        """Leave the line as it is last."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, summary: Summary) -> None:
        """The first line after the log in the colour of what has happened."""
        self.close()
        for number, line in enumerate(summary.lines()):
            is_title = number == len(summary.log_tail)
            style = _COLOURS.get(summary.status, "") if is_title else ""
            # Left to the terminal to wrap: a command that is copied must not have a line break in it.
            self._console.print(Text(line, style=style), soft_wrap=True)

    def _line(self) -> RenderableType:
        if self.track.num_steps == 0:
            dots = " ..." if self.track.is_leaving else ""
            self._spinner.update(text=Text(f" {self.track.phase}{dots}"))
            return self._spinner
        # One line, however narrow the terminal: a second one could not be taken back.
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        width = 24 if self._console.width >= 100 else 8
        bar = ProgressBar(total=max(1, self.track.iters), completed=self.track.iteration, width=width)
        if self.track.is_leaving:  # nothing moves but this
            text = f"{self.track.place_text()}  {self.track.phase} ..."
        else:
            phase = "" if self.track.phase == "training" else f"  {self.track.phase}"
            text = self.track.step_text() + phase
        line.add_row(bar, Text(text))
        return line
