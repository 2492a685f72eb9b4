"""What a whole checkpoint is: each file's size and SHA-256, written when all of them are on the disk.

The manifest ends with the SHA-256 of itself and has one spelling only, so that no byte of it changes unseen
either. It is no signature: who can write to the folder can write files and a manifest that agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors, fsync_folder, strict_json, write_bytes_atomic
from megaplug.runs.hashed import Written

MANIFEST = "manifest.json"
_VERSION = 2
# Before, a manifest said nothing of itself.
_VERSION_WITHOUT_DIGEST = 1
_DIGEST = "sha256"
_CHUNK = 4 << 20
_THREADS = min(8, os.cpu_count() or 1)  # hashing and reading both let go of the interpreter


def write_manifest(
    checkpoint_dir: Path,
    extra: Mapping[str, Any] | None = None,
    written: Mapping[str, Written] | None = None,
) -> None:
    """Make every file of a checkpoint durable, then list them in ``manifest.json``, renamed into place last.

    Args:
        checkpoint_dir: A folder that nobody writes to any more.
        extra: Kept in the manifest under ``extra``, for instance the model's fingerprint.
        written: What the writers of some files know; those are durable already and not read again.

    Raises:
        UserError: If the folder cannot be read or written, holds what is neither file nor folder, or not as
            much as was written.
    """
    written = written or {}
    with disk_errors(checkpoint_dir, "write the manifest of"):
        sizes, others = _walk(checkpoint_dir)
        if others:
            raise UserError(f"{checkpoint_dir} holds what is neither file nor folder: {', '.join(others)}")
        for name, known in sorted(written.items()):
            if sizes.get(name) != known.size:
                found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise UserError(f"{checkpoint_dir / name} {found}; {known.size} were written", exit_code=1)
        unknown = sorted(sizes.keys() - written.keys())
        with ThreadPoolExecutor(_THREADS) as pool:
            read = list(pool.map(lambda name: _sha256(checkpoint_dir / name, durable=True), unknown))
        for folder, _, _ in os.walk(checkpoint_dir):
            fsync_folder(Path(folder))
        hashes = {name: known.sha256 for name, known in written.items()} | dict(
            zip(unknown, read, strict=True)
        )
        files = {name: {"size": sizes[name], "sha256": hashes[name]} for name in sorted(sizes)}
        content = {"version": _VERSION, "files": files, "extra": dict(extra or {})}
        content[_DIGEST] = hashlib.sha256(_spelt(content)).hexdigest()
        write_bytes_atomic(checkpoint_dir / MANIFEST, _spelt(content))


def read_manifest(checkpoint_dir: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where it has none, or one that is not as it was written."""
    return _read(checkpoint_dir)[0]


def verify_manifest(
    checkpoint_dir: Path, tell: Callable[[int], None] | None = None, *, read: bool = True
) -> list[str]:
    """What is wrong with a checkpoint's files, all of it; empty when it is whole.

    Args:
        checkpoint_dir: The checkpoint.
        tell: Called, on several threads, with how many bytes more have been read.
        read: False to compare names and sizes only, which is done at once.

    Raises:
        UserError: If the disk refuses to be read: that says nothing about the checkpoint.
    """
    manifest, fault = _read(checkpoint_dir)
    if manifest is None:
        return [fault]
    files = manifest["files"]
    with disk_errors(checkpoint_dir, "verify"):
        sizes, others = _walk(checkpoint_dir)
        faults = [f"{name} is neither file nor folder" for name in others]
        faults += [f"{name} is missing" for name in sorted(files.keys() - sizes.keys())]
        faults += [f"{name} is not in the manifest" for name in sorted(sizes.keys() - files.keys())]
        same_size = []
        for name in sorted(files.keys() & sizes.keys()):
            if sizes[name] == files[name]["size"]:
                same_size.append(name)
            else:
                faults.append(f"{name} has {sizes[name]} bytes in place of {files[name]['size']}")
        if faults or not read:
            return faults  # no need to read gigabytes to learn the same
        hashes = _hashes(checkpoint_dir, same_size, tell)
        changed = [name for name in same_size if hashes[name] != files[name]["sha256"]]
    return [f"{name} has other bytes than were saved" for name in changed]


def _read(checkpoint_dir: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest, or None and why there is none."""
    path = checkpoint_dir / MANIFEST
    with disk_errors(path, "read"):
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None, _no_manifest(checkpoint_dir)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None, f"its {MANIFEST} cannot be understood"
    if not _understood(content):
        return None, f"its {MANIFEST} cannot be understood"
    return (content, "") if _as_written(content, text) else (None, f"its {MANIFEST} was changed")


def _no_manifest(checkpoint_dir: Path) -> str:
    """Only a whole checkpoint gets the name of one; below ``saving`` it has that name before."""
    named = re.fullmatch(r"iter_[0-9]+", checkpoint_dir.name) and checkpoint_dir.parent.name != "saving"
    why = "it was removed, or plain Megatron wrote this" if named else "saving it was never completed"
    return f"it has no {MANIFEST}: {why}"


def _spelt(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(strict_json(content), indent=2, allow_nan=False) + "\n").encode()


def _as_written(content: dict[str, Any], text: bytes) -> bool:
    """Whether not a byte of a manifest is another."""
    without = {key: value for key, value in content.items() if key != _DIGEST}
    if content["version"] == _VERSION_WITHOUT_DIGEST:
        return without == content
    return _spelt(content) == text and content.get(_DIGEST) == hashlib.sha256(_spelt(without)).hexdigest()


def _understood(content: Any) -> bool:
    if not isinstance(content, dict) or content.get("version") not in (_VERSION, _VERSION_WITHOUT_DIGEST):
        return False
    files = content.get("files")
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def _walk(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Sizes in bytes of the regular files below a folder, and what is none; links are not followed."""
    sizes: dict[str, int] = {}
    others: list[str] = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = str(Path(entry.path).relative_to(folder))
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(Path(entry.path))
                elif not stat.S_ISREG(status.st_mode):
                    others.append(name)
                elif name != MANIFEST and not (name.startswith(f".{MANIFEST}.") and name.endswith(".tmp")):
                    sizes[name] = status.st_size
    return sizes, sorted(others)


def _hashes(folder: Path, names: list[str], tell: Callable[[int], None] | None) -> dict[str, str]:
    """What files hold; a Ctrl-C does not wait until gigabytes are read."""
    stopped = threading.Event()

    def told(num_bytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        if tell is not None:
            tell(num_bytes)

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            found = pool.map(lambda name: _sha256(folder / name, tell=told), names)
            return dict(zip(names, found, strict=True))
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _sha256(path: Path, *, durable: bool = False, tell: Callable[[int], None] | None = None) -> str:
    """Streamed, so that a shard of many gigabytes needs a few megabytes of memory."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while chunk := os.read(fd, _CHUNK):
            digest.update(chunk)
            if tell is not None:
                tell(len(chunk))
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()
