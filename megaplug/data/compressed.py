"""Files as streams of bytes, decompressed where their ending says so."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Buffer, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megaplug.data.libraries import optional
from megaplug.errors import UserError

_CHUNK = 1 << 20
_LONGEST_WINDOW = 1 << 31  # bytes, those of zstd --long=31; unasked, zstandard takes 128 MiB for damage
# RFC 1952 and RFC 8878: the first bytes of a file.
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}


@dataclass
class Stream:
    """A file that is being read.

    Attributes:
        data: What is in it, decompressed.
        file: The file itself.
    """

    data: BinaryIO
    file: BinaryIO
    _told: int = 0

    def num_read(self) -> int:
        """Bytes of the file that were read since the last call."""
        before, self._told = self._told, self.file.tell()
        return max(0, self._told - before)


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Opens a file for reading.

    Raises:
        UserError: It cannot be decompressed, or is cut off.
        OSError: It cannot be read.
    """
    ending = path.suffix.lower()
    if ending == ".zst":
        zstandard = optional("zstandard", str(path))
        broken: tuple[type[Exception], ...] = (zstandard.ZstdError, EOFError)
    else:
        broken = (gzip.BadGzipFile, zlib.error, EOFError)
    try:
        with path.open("rb") as file:
            if ending == ".gz":
                with gzip.GzipFile(fileobj=file) as data:
                    yield Stream(io.BufferedReader(data, _CHUNK), file)
            elif ending == ".zst":
                yield Stream(io.BufferedReader(_Zstandard(file, zstandard), _CHUNK), file)
            else:
                yield Stream(file, file)
    except broken as error:
        raise UserError(f"data.path: {path} cannot be decompressed: {error}", hint=_cure(path)) from error


def _cure(path: Path) -> str:
    """What to do about a file that cannot be decompressed; one that is not compressed at all is told."""
    with path.open("rb") as file:
        begins_right = file.read(len(_MAGIC[path.suffix.lower()])) == _MAGIC[path.suffix.lower()]
    if begins_right:
        return "it is damaged or cut off; copy it again"
    return f"it does not begin as such a file does: take {path.suffix} from its name, or compress it"


class _Zstandard(io.RawIOBase):
    """All frames of a file, decompressed; raises where the last is cut off: zstandard's reader does not."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file = file
        self._new = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj
        self._frame = self._new()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._ready:
            if self._frame.eof:
                rest = self._frame.unused_data
                self._frame, self._inside = self._new(), False
            else:
                rest = b""
            data = rest or self._file.read(_CHUNK)
            if not data:
                if self._inside:
                    raise EOFError("it ends inside a frame")
                return 0
            self._inside = True
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._inside = False
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
