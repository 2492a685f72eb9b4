"""A checkpoint copied to another folder: beside its place, verified, and named when it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors, fsync_folder, size_text
from megaplug.runs.checkpoints import faults_of
from megaplug.runs.manifest import MANIFEST, read_manifest, verify_manifest

_CHUNK = 4 << 20
_SETTING = "to="


@dataclass(frozen=True)
class Copied:
    """A copy.

    Attributes:
        path: Where it is.
        num_bytes_found: How much of it was there already, from a copy that was broken off.
    """

    path: Path
    num_bytes_found: int


def copy_checkpoint(source: Path, to: Path, tell: Callable[[int], None] | None = None) -> Copied:
    """Copy a checkpoint; it has its name in ``to`` only when every file there is as it was saved.

    What is broken off stays in ``to/.<name>.copying``; the next copy takes from it the files that are right.

    Args:
        source: An ``iter_*`` folder.
        to: The folder that receives it; made where it is not there.
        tell: Called, on several threads, with how many bytes more are done, of twice the size.

    Raises:
        UserError: The source is damaged, the name is taken, or a disk is full or refuses.
    """
    tell = tell or (lambda _: None)
    faults, manifest = verify_manifest(source, read=False), read_manifest(source)
    if faults or manifest is None:
        raise _damaged(source, faults)
    target = to / source.absolute().name
    if os.path.lexists(target):
        raise UserError(f"{target} exists already", hint="move it away, or give another folder with to=")
    with disk_errors(to, "copy to", _SETTING):
        to.mkdir(parents=True, exist_ok=True)
    beside = to / f".{target.name}.copying"
    with _alone(beside):
        found = _already(beside, manifest, tell)
        _room(to, sum(entry["size"] for entry in manifest["files"].values()) - sum(found.values()))
        for name, entry in manifest["files"].items():
            if name not in found:
                _copy(source / name, beside / name, entry["sha256"], source, tell)
        _copy(source / MANIFEST, beside / MANIFEST, None, source, lambda _: None)
        if wrong := faults_of(beside, tell):
            with disk_errors(beside, "remove the copy", _SETTING):
                shutil.rmtree(beside)
            raise _damaged(source, wrong)
        with disk_errors(target, "give the copy its name", _SETTING):
            for folder, _, _ in os.walk(beside):
                fsync_folder(Path(folder))
            beside.rename(target)
            fsync_folder(to)
    return Copied(target, sum(found.values()))


def _damaged(source: Path, faults: list[str]) -> UserError:
    hint = "a run's other checkpoints: action=verify run=FOLDER"
    return UserError(f"{source} is not copied: {faults[0]}", hint=hint, exit_code=1)


@contextmanager
def _alone(beside: Path) -> Iterator[None]:
    """Nobody else copies to the same place; a lock that ends with the process."""
    with disk_errors(beside, "copy to", _SETTING):
        beside.mkdir(exist_ok=True)
        fd = os.open(beside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with disk_errors(beside, "lock", _SETTING):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is copying to {beside}", hint="wait until it ends"
                ) from None
        yield
    finally:
        os.close(fd)


def _already(beside: Path, manifest: dict[str, Any], tell: Callable[[int], None]) -> dict[str, int]:
    """The files of an earlier copy that are right, with their sizes; what is not is removed."""
    right: dict[str, int] = {}
    with disk_errors(beside, "look into", _SETTING):
        for path in sorted(beside.rglob("*")):
            name, entry = str(path.relative_to(beside)), manifest["files"].get(str(path.relative_to(beside)))
            if path.is_dir() and not path.is_symlink():
                continue
            if entry is not None and not path.is_symlink() and path.stat().st_size == entry["size"]:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]:
                        right[name] = entry["size"]
                        tell(entry["size"])
                        continue
            path.unlink()
    return right


def _room(to: Path, needed: int) -> None:
    with disk_errors(to, "look at", _SETTING):
        free = shutil.disk_usage(to).free
    if needed > free:
        raise UserError(
            f"the disk of {to} has {size_text(free)} left, and {size_text(needed)} are to be copied",
            hint=f"free some space there, or choose another disk with {_SETTING}",
        )


def _copy(
    source: Path, target: Path, sha256: str | None, checkpoint: Path, tell: Callable[[int], None]
) -> None:
    """One file, durable when it returns, and hashed on the way."""
    digest = hashlib.sha256()
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        message = f"{source} has gone while its checkpoint was copied"
        raise UserError(
            message, hint="its run keeps only its newest ones: copy a newer one", exit_code=1
        ) from error
    with disk_errors(target, "write", _SETTING), os.fdopen(fd, "rb") as reading:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as writing:
            while chunk := reading.read(_CHUNK):
                digest.update(chunk)
                writing.write(chunk)
                tell(len(chunk))
            writing.flush()
            os.fsync(writing.fileno())
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _damaged(checkpoint, [f"{source.name} has other bytes than were saved"])
