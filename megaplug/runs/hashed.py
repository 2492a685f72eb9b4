"""Files that are hashed while they are written, so that nobody has to read gigabytes again to learn it.

A writer may be another process, or on another machine: what it has found out is a small note in a folder
beside.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_BUFFER = 1 << 20


@dataclass(frozen=True)
class Written:
    """What a writer knows of its file.

    Attributes:
        size: In bytes.
        sha256: Of these bytes, in hexadecimal.
    """

    size: int
    sha256: str


class HashedFile(io.BufferedWriter):
    """A file that is written from its beginning to its end; closed, it is durable and its note is written.

    Args:
        path: The file.
        note: Where its size and hash go; nothing is written there if the block is left by an exception.
    """

    def __init__(self, path: Path, note: Path) -> None:
        super().__init__(io.FileIO(path, "w"), _BUFFER)
        self._note = note
        self._digest = hashlib.sha256()
        self._size = 0
        self._failed = False

    def write(self, data: Any) -> int:
        """As for any file."""
        try:
            written = super().write(data)
        except BaseException:
            self._failed = True
            raise
        self._digest.update(data)
        self._size += written
        return written

    def seekable(self) -> bool:
        """It is not: what was hashed cannot be taken back."""
        return False

    def seek(self, *_: Any) -> int:
        """Refused.

        Raises:
            io.UnsupportedOperation: Always.
        """
        raise io.UnsupportedOperation("a file that is hashed while it is written")

    def close(self) -> None:
        """Make the bytes durable, then say what they are."""
        if self.closed:
            return
        try:
            if not self._failed:
                self.flush()
                os.fsync(self.fileno())
        except BaseException:
            self._failed = True
            raise
        finally:
            # What could not be written is not tried again.
            self.raw.close() if self._failed else super().close()
        if not self._failed:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._note.write_text(json.dumps([self._size, self._digest.hexdigest()]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = self._failed or error is not None
        self.close()


def hashing_open(place: Path) -> Callable[..., Any]:
    """Python's ``open``, but whoever writes bytes to a file below ``place`` gets a `HashedFile`.

    Args:
        place: A folder of folders; the notes of ``place/x/y`` go to ``place/x.notes/y``.
    """

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb" and not args and not kwargs:
            absolute = Path(path).absolute()
            if absolute.is_relative_to(place) and len(absolute.relative_to(place).parts) > 1:
                return HashedFile(absolute, _note(absolute, place))
        return Path(path).open(mode, *args, **kwargs)

    return opened


def notes_folder(folder: Path) -> Path:
    """Where the notes on the files of a folder are."""
    return folder.with_name(f"{folder.name}.notes")


def read_notes(folder: Path) -> dict[str, Written]:
    """What the writers of a folder's files have said, by the file's name below it."""
    notes = notes_folder(folder)
    found = {}
    for path in notes.rglob("*"):
        if path.is_file():
            size, sha256 = json.loads(path.read_text())
            found[str(path.relative_to(notes))] = Written(size, sha256)
    return found


def _note(path: Path, place: Path) -> Path:
    first, *rest = path.relative_to(place).parts
    return notes_folder(place / first).joinpath(*rest)
