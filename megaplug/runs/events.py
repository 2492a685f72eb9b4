"""What a rank tells its supervisor: JSON objects, one a line, each short enough to be written whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

EVENTS_FD = "MEGAPLUG_EVENTS_FD"
PARENT_FD = "MEGAPLUG_PARENT_FD"
STORE_FD = "MEGAPLUG_STORE_FD"
STACK_FD = "MEGAPLUG_STACK_FD"

# On it a rank writes the stacks of its threads to STACK_FD. A real-time signal: SIGUSR1 and 2 have users.
STACK_SIGNAL = signal.SIGRTMIN + 3

# POSIX: a write of at most PIPE_BUF (4096 on Linux) bytes to a pipe is never mixed with another.
MAX_LINE = 4096


class EventWriter:
    """The rank's end of the pipe.

    Args:
        fd: Where to write; None where nobody listens, and then every call does nothing.
    """

    def __init__(self, fd: int | None) -> None:
        self.fd = fd

    @classmethod
    def from_environment(cls) -> EventWriter:
        """The writer for the pipe that the supervisor has named, if there is a supervisor."""
        fd = os.environ.get(EVENTS_FD)
        return cls(int(fd) if fd else None)

    def write(self, event: str, **values: Any) -> None:
        """Send one event with the wall-clock time; texts too long for one write lose their middle.

        A supervisor that has gone is no error here: the watchdog ends the rank.
        """
        if self.fd is None:
            return
        line = _encode({"event": event, "time": time.time(), **values})
        with contextlib.suppress(BrokenPipeError):
            os.write(self.fd, line)


def _encode(content: dict[str, Any]) -> bytes:
    line = (json.dumps(content) + "\n").encode()
    while len(line) > MAX_LINE:
        texts = {key: value for key, value in content.items() if isinstance(value, str)}
        longest = max(texts, key=lambda key: len(texts[key]), default=None)
        assert longest is not None and len(texts[longest]) > 8, (
            "an event of more than 4096 bytes without a long text"
        )
        text = texts[longest]
        keep = len(text) // 3
        content = {**content, longest: f"{text[:keep]} ... {text[-keep:]}" if keep > 8 else text[:keep]}
        line = (json.dumps(content) + "\n").encode()
    return line


def parse_event(line: str | bytes) -> dict[str, Any] | None:
    """The event in a line, or None where the line holds none (a library's stray output)."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, Mapping) or not isinstance(content.get("event"), str):
        return None
    return dict(content)
