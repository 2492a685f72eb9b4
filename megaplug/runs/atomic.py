"""Files that are either the old text or the new one, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megaplug.errors import UserError

_BESIDE = re.compile(r"\..+\.[0-9]+(-[0-9a-f]{8})?\.tmp")  # without the letters, of earlier versions
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def disk_errors(path: Path, doing: str, setting: str = "runs_dir=") -> Iterator[None]:
    """Turn what a disk can refuse into an error that a person can mend.

    Args:
        path: The file or folder at hand, for the message.
        doing: What was tried, such as ``"set a checkpoint aside in"``.
        setting: What a user types to choose another place.

    Raises:
        UserError: On any ``OSError`` inside the block.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = ""
        if error.errno in _FULL:
            hint = f"free some space on that disk ({_free_space(path)}), or choose another with {setting}"
        elif error.errno in _FORBIDDEN:
            hint = f"make {path} writable and readable for this user, or choose another place with {setting}"
        elif error.errno in _NO_FOLDER:
            hint = f"a file has the name of a folder: move it away, or choose another place with {setting}"
        raise UserError(f"cannot {doing} {path}: {reason}", hint=hint) from error


def _free_space(path: Path) -> str:
    for place in (path, *path.parents):
        if place.exists():
            return f"{size_text(shutil.disk_usage(place).free)} are left"
    return "its free space is unknown"


def size_text(num_bytes: float) -> str:
    """Bytes in the unit that suits them, of powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text_atomic(path: Path, text: str, setting: str = "runs_dir=") -> None:
    """Write ``text`` beside ``path``, make it durable, and rename it into place.

    Raises:
        UserError: If the disk is full or may not be written to.
    """
    write_bytes_atomic(path, text.encode(), setting)


def write_bytes_atomic(path: Path, content: bytes, setting: str = "runs_dir=") -> None:
    """As `write_text_atomic`, for bytes."""
    with disk_errors(path, "write", setting), replaced(path) as file:
        file.write(content)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which has its name when it is whole and durable; none where the block fails."""
    unfinished = beside(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync_folder(path.parent)


def beside(path: Path) -> Path:
    """Where a file is written before it has its name; `remove_unfinished` knows it.

    The letters are by chance: containers that share a disk may number their processes alike.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what processes that were killed were writing beside the files of a folder, and return it.

    Nobody may be writing there.
    """
    if not folder.is_dir():
        return []
    with disk_errors(folder, "remove the leftovers in"):
        left = [path for path in folder.iterdir() if _BESIDE.fullmatch(path.name)]
        for path in left:
            path.unlink()
    return left


def strict_json(value: Any) -> Any:
    """The same value with every NaN or infinity as None: JSON knows neither, and most readers refuse them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return value


def write_json_atomic(path: Path, value: Any, setting: str = "runs_dir=") -> None:
    """Write ``value`` as indented strict JSON, atomically."""
    write_text_atomic(path, json.dumps(strict_json(value), indent=2, allow_nan=False) + "\n", setting)
