"""What helper processes of a command say, without a file on a disk that somebody would have to remove."""

from __future__ import annotations

import os
from typing import TextIO

# A traceback's last lines, which name the fault.
_SHOWN_LINES = 14


def in_memory(name: str) -> TextIO:
    """A file to write and read, without a name in any folder; it is gone when nobody has it open."""
    return os.fdopen(os.memfd_create(f"megaplug-{name}"), "w+", errors="replace")


def content(file: TextIO) -> str:
    """All that was written to such a file, which is closed."""
    with file:
        file.seek(0)
        return file.read()


def last_words(said: str) -> str:
    """The lines that are worth showing of what a process said that failed."""
    return "\n".join(said.strip().splitlines()[-_SHOWN_LINES:])
