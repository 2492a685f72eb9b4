"""Where tokenized data is kept, by content: whole entries only, built aside and renamed into place.

::

    <root>/<fingerprint>/                   entry.json, train.bin, train.idx, valid.bin, ...
    <root>/building-<fingerprint>-<host>-<random>/
                                            what is being built, or what a killed build left
    <root>/locks/<fingerprint>.lock         held while that entry is built
    <root>/shortcuts/<path and key>.json    what is known of files that look unchanged
    <root>/blends/<fingerprint>.json        what is known of several entries together
    <root>/tokenizers/<fingerprint>/        tokenizers as Megatron reads them

Where the file system knows no locks, or only within a machine, two jobs may build the same entry; each then
builds in a folder of its own, and the first to be done puts its own in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megaplug.errors import UserError
from megaplug.runs.atomic import fsync_folder, write_text_atomic

FORMAT = 1
"""Part of every fingerprint and shortcut: a change of what is built for the same text must raise it."""

_ENTRY = "entry.json"
_HINT = "choose another place with data.cache_dir="

# A change within a file system's clock tick leaves the same stamp; two seconds cover the coarsest.
_TICK_NS = 2_000_000_000

_DAY_S = 86_400.0


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(f"data: {line}", file=sys.stderr, flush=True)


def cache_root(cache_dir: str | None) -> Path:
    """``data.cache_dir``, else megaplug/data in ``$XDG_CACHE_HOME``, else in ``~/.cache``; absolute."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "megaplug" / "data"


@contextlib.contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """Turns what the disk refuses inside the block into a `UserError` that names the cache."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(place for place in (root, *root.parents) if place.exists())
            left = shutil.disk_usage(existing).free / 1e6
            raise UserError(
                f"data.cache_dir: the disk of {root} is full ({left:,.1f} MB are left)",
                hint="free some space, or " + _HINT,
            ) from error
        raise UserError(f"data.cache_dir: {root} cannot be written: {error}", hint=_HINT) from error


def write_cached(path: Path, text: str) -> None:
    """Writes a small file of the cache atomically, its folder too; `UserError` when that cannot be."""
    with cache_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_text_atomic(path, text)
    except UserError as error:
        raise UserError(error.message, hint=_HINT) from error


def recall(root: Path, name: str, listing: str) -> dict[str, Any] | None:
    """What was remembered of some files, if none of them has changed since.

    Args:
        root: The cache.
        name: As in `remember`.
        listing: Digest of names, sizes and stamps of the files.
    """
    try:
        kept = json.loads(_shortcut(root, name).read_bytes())
        is_known = (kept["format"], kept["listing"]) == (FORMAT, listing)
        return dict(kept["known"]) if is_known else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # there is none, or it is damaged: the files are read


def remember(root: Path, name: str, listing: str, known: dict[str, Any], age_ns: int) -> None:
    """Keeps what is known of some files for `recall`, unless one is so new that a change could go unseen.

    Args:
        root: The cache.
        name: Of the files together, such as their folder.
        listing: Digest of names, sizes and stamps, from before they were read.
        known: Plain values.
        age_ns: How long before they were listed the last of them had changed, in ns.
    """
    if age_ns < _TICK_NS:
        return
    try:
        kept = {"format": FORMAT, "listing": listing, "known": known}
        write_cached(_shortcut(root, name), json.dumps(kept) + "\n")
    except UserError as error:
        say(f"the next start must read all files again: {error.message}")


def forget(root: Path, name: str) -> None:
    """Drops what was remembered of some files under this name."""
    with cache_errors(root):
        _shortcut(root, name).unlink(missing_ok=True)


def _shortcut(root: Path, name: str) -> Path:
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return root / "shortcuts" / f"{digest}.json"


def read_entry(root: Path, fingerprint: str) -> tuple[dict[str, Any] | None, str]:
    """What is known of an entry, or None and what is wrong with it (nothing, if there is none)."""
    folder = root / fingerprint
    if not folder.is_dir():
        return None, ""
    try:
        entry = json.loads((folder / _ENTRY).read_bytes())
        sizes = dict(entry["sizes"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        return None, f"{_ENTRY} cannot be read ({error})"
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return None, f"{name} is missing"
        if found != size:
            return None, f"{name} has {found} bytes in place of {size}"
    return entry, ""


@contextlib.contextmanager
def building_lock(root: Path, fingerprint: str) -> Iterator[bool]:
    """Held by the one job that builds an entry; others wait here, and then find it built.

    Yields:
        Whether it is held: there are file systems that know no locks.
    """
    with cache_errors(root):
        (root / "locks").mkdir(parents=True, exist_ok=True)
        lock = _open_lock(root, fingerprint)
    with lock:
        is_held = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another job is preparing the same data; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            # Building aside and renaming stays right without a lock; only work may be done twice.
            say(f"{root} knows no locks ({error.strerror}); two jobs may prepare the same data at once")
            is_held = False
        yield is_held


def _open_lock(root: Path, fingerprint: str) -> BinaryIO:
    """Another user's can be read only, which is enough for most file systems to lock it."""
    file = root / "locks" / f"{fingerprint}.lock"
    try:
        return file.open("ab")
    except PermissionError:
        return file.open("rb")


@contextlib.contextmanager
def building_folder(root: Path, fingerprint: str, *, is_locked: bool) -> Iterator[Path]:
    """A folder to build an entry in, removed at the end; what killed builds have left goes first.

    Args:
        root: The cache.
        fingerprint: Of the entry.
        is_locked: Whether `building_lock` is held, or nobody can say whether another builds the same.
    """
    remove_leftovers(root, fingerprint if is_locked else None)
    with cache_errors(root):
        folder = _new_folder(root, fingerprint)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(root: Path, fingerprint: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"building-{fingerprint}-{_host()}-", dir=root))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


def remove_leftovers(root: Path, held: str | None) -> None:
    """Removes what killed builds have left: the folders whose lock is free, or is ``held`` by us.

    Locks may hold within one machine only, or not at all. So what another machine builds, and what has no
    lock, is taken for left when nothing in it has changed for a day.
    """
    for folder in root.glob("building-*-*"):
        fingerprint, _, rest = folder.name.removeprefix("building-").partition("-")
        is_ours = rest.rpartition("-")[0] == _host()
        if fingerprint == held:
            if is_ours or _is_still(folder):
                shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            lock = _open_lock(root, fingerprint)
        except OSError as error:
            say(f"{folder} may be left of a killed build, and stays: its lock is not ours ({error.strerror})")
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # it is being built
            except OSError:
                is_ours = False  # nobody can say whether it is
            if is_ours or _is_still(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_still(folder: Path) -> bool:
    """Whether nothing in a folder has changed for a day."""
    try:
        newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return False  # something in it comes or goes
    return time.time() - newest > _DAY_S


def put_in_place(root: Path, fingerprint: str, building: Path, entry: dict[str, Any]) -> None:
    """Makes a built folder the entry: durable first, then renamed, over a damaged one if there is one."""
    with cache_errors(root):
        files = sorted(building.iterdir())
        entry = {**entry, "sizes": {file.name: file.stat().st_size for file in files}}
        for file in files:
            if not file.is_symlink():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        write_cached(building / _ENTRY, json.dumps(entry, indent=2) + "\n")
        # mkdtemp makes it private; a cache may be shared, as far as the user's mask allows.
        os.umask(mask := os.umask(0o022))
        building.chmod(0o777 & ~mask)
        final = root / fingerprint
        if final.exists():
            if read_entry(root, fingerprint)[0] is not None:
                return  # another job was faster, and its files are the same
            damaged = _new_folder(root, fingerprint)
            final.rename(damaged)
            shutil.rmtree(damaged)
        try:
            building.rename(final)
        except OSError:
            if read_entry(root, fingerprint)[0] is None:
                raise
            return  # as above, this very moment
        fsync_folder(root)
