"""Which files a path of ``data.path`` stands for: the standard library, a file, or a folder of files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megaplug.data import kinds
from megaplug.data.saved_sets import files_of_set, is_set
from megaplug.errors import UserError

STDLIB = "stdlib"
"""The path that means the sources of the running Python's standard library."""

# Not Python's own text: installed packages. Tests are two thirds of the whole, much of it tables, and
# some of it is not UTF-8 on purpose. The build configuration differs from machine to machine.
_STDLIB_FOLDERS_LEFT_OUT = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
)
_STDLIB_FILES_LEFT_OUT = ("_sysconfigdata", "sitecustomize")


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus, as it was when the corpus was listed.

    Attributes:
        path: Where it is.
        name: Its path below the corpus, with forward slashes.
        size: Bytes.
        stamp: What changes whenever the content does: times of change in ns, inode.
        kind: One of `megaplug.data.kinds`; None if its ending is not known.
    """

    path: Path
    name: str
    size: int
    stamp: tuple[int, int, int]
    kind: str | None = kinds.TEXT


@dataclass(frozen=True)
class Prefix:
    """A ``.bin`` and ``.idx`` of Megatron's.

    Attributes:
        path: Of both, without the endings.
        bin: The ids.
        idx: Where the documents begin.
    """

    path: Path
    bin: SourceFile
    idx: SourceFile


@dataclass(frozen=True)
class Corpus:
    """The files behind one path, sorted by name; at least one file or prefix.

    Attributes:
        title: What it is called when a person reads of it.
        root: The file or folder.
        files: Those that hold text.
        text_key: The key or column that holds the text where there are several.
        prefixes: Those that are tokenized already.
        left_out: Endings and numbers of a folder's files that are not read; empty if there are none.
    """

    title: str
    root: Path
    files: tuple[SourceFile, ...]
    text_key: str
    prefixes: tuple[Prefix, ...] = ()
    left_out: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files of text."""
        return sum(file.size for file in self.files)

    @property
    def newest_ns(self) -> int:
        """The latest change of any file of text, in ns since 1970."""
        return newest_ns(self.files)

    def listing(self) -> str:
        """Hex digest of names, sizes and stamps of the text; differs whenever a file may have changed."""
        return listing(self.files, self.text_key)


def newest_ns(files: tuple[SourceFile, ...]) -> int:
    """The latest change of any of the files, in ns since 1970."""
    return max(max(file.stamp[:2]) for file in files)


def listing(files: tuple[SourceFile, ...], text_key: str = "") -> str:
    """Hex digest of names, sizes and stamps; differs whenever a file may have changed."""
    rows = [(file.name, file.size, *file.stamp) for file in files]
    return hashlib.sha256(json.dumps([text_key, rows]).encode()).hexdigest()


def find_corpus(path: str, text_key: str = "text", without: Path | None = None) -> Corpus:
    """Lists the files that a path stands for.

    Hidden files and folders (a leading dot) are left out; files of a folder with endings that are not known
    are left out too, and named in ``left_out``.

    Args:
        path: As configured.
        text_key: The key or column that holds the text.
        without: A folder that is not entered, wherever it lies: the cache, whose pairs are no source.

    Raises:
        UserError: There is no such path, it cannot be listed, its ending is not known, no file is in it, or
            it is the folder that is not to be entered.
    """
    if path == STDLIB:
        return _find_stdlib(text_key)
    if not path:
        raise UserError("data.path: it is empty", hint=f"give a path: {kinds.KNOWN}")
    root = Path(path).expanduser().absolute()
    if (prefix := _prefix_at(root)) is not None:
        title = f"{prefix.path.name} (tokenized)"
        return Corpus(title, prefix.path, (), text_key, prefixes=(prefix,))
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise _unreadable(root, error) from error
    if not stat.S_ISDIR(mode):
        return _one_file(root, mode, text_key)
    return _folder(root, text_key, without)


def _one_file(root: Path, mode: int, text_key: str) -> Corpus:
    if kinds.kind_of(root.name) is None:
        ending = kinds.ending_of(root.name) or "nothing"
        raise UserError(
            f"data.path: {root} ends in {ending!r}, not in a known kind of text", hint=kinds.KNOWN
        )
    if not stat.S_ISREG(mode):
        raise UserError(f"data.path: {root} is not a regular file", hint="copy its content into a file")
    return Corpus(root.name, root, (_source_file(root, root.name),), text_key)


def _folder(root: Path, text_key: str, without: Path | None) -> Corpus:
    left = None if without is None else _identity(without)
    if left is not None and left == _identity(root):
        raise UserError(
            f"data.path: {root} is the cache, which would be read as text at the next start",
            hint="keep them apart, with data.cache_dir= or in a folder of its own inside it",
        )
    seen = list(_walk(root, lambda folder: not folder.startswith("."), left))
    known = [f for f in seen if f.kind is not None and not f.path.name.startswith(".")]
    prefixes = _prefixes([f for f in known if f.kind == kinds.PREFIX])
    files = [f for f in known if f.kind != kinds.PREFIX]
    other = _endings([f for f in seen if f.kind is None and not f.path.name.startswith(".")])
    if not known:
        there_are = f" (there are: {other})" if other else " (it is empty)"
        raise UserError(f"data.path: no file of a known kind is in {root}{there_are}", hint=kinds.KNOWN)
    numbers = [_count(files)] * bool(files) + [f"{len(prefixes)} tokenized"] * bool(prefixes)
    return Corpus(f"{root.name}/ ({', '.join(numbers)})", root, _by_name(files), text_key, prefixes, other)


def _prefix_at(root: Path) -> Prefix | None:
    """The prefix that a path names, with or without one of its two endings."""
    if root.suffix in (".bin", ".idx"):
        root = root.with_suffix("")
    elif root.exists():
        return None
    pair = [Path(f"{root}{ending}") for ending in (".bin", ".idx")]
    there = [path.is_file() for path in pair]
    if not any(there):
        return None
    if not all(there):
        have, lack = pair if there[0] else pair[::-1]
        raise UserError(
            f"data.path: {have} has no {lack.name} beside it", hint="a Megatron prefix is a .bin and an .idx"
        )
    return Prefix(root, *(_source_file(path, path.name) for path in pair))


def _prefixes(files: list[SourceFile]) -> tuple[Prefix, ...]:
    roots = sorted({file.path.with_suffix("") for file in files})
    return tuple(prefix for root in roots if (prefix := _prefix_at(root.with_name(root.name + ".idx"))))


def _find_stdlib(text_key: str) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _walk(root, lambda folder: folder not in _STDLIB_FOLDERS_LEFT_OUT)
    files = [
        replace(f, kind=kinds.TEXT)
        for f in found
        if f.path.suffix == ".py" and not f.path.name.startswith(_STDLIB_FILES_LEFT_OUT)
    ]
    if not files:
        raise UserError(
            f"data.path: this Python has no sources of its standard library in {root}",
            hint="set data.path to a .txt or .jsonl file or folder of your own",
        )
    title = f"Python {platform.python_version()} standard library ({_count(files)})"
    return Corpus(title, root, _by_name(files), text_key)


def _by_name(files: list[SourceFile]) -> tuple[SourceFile, ...]:
    return tuple(sorted(files, key=lambda file: file.name))


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from all others, by whatever path it is reached; None where there is none."""
    try:
        about = folder.stat()
    except OSError:
        return None  # it cannot be entered either
    return about.st_dev, about.st_ino


def _walk(
    root: Path, enter: Callable[[str], bool], left: tuple[int, int] | None = None
) -> Iterator[SourceFile]:
    """Every regular file below ``root``; linked folders are entered once, so that no circle is endless.

    Args:
        root: A folder.
        enter: Says by its name whether a folder below it is entered.
        left: The `_identity` of one that is not.
    """
    entered: set[tuple[int, int]] = set() if left is None else {left}
    waiting = [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in entered:
                continue
            entered.add((about.st_dev, about.st_ino))
            if is_set(folder):
                for file in files_of_set(folder):
                    yield _source_file(file, prefix + file.name)
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if enter(entry.name):
                            waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))
                    elif entry.is_file():
                        yield _source_file(Path(entry.path), prefix + entry.name)
                    else:
                        _refuse_dangling(entry)
        except OSError as error:
            raise _unreadable(folder, error) from error


def _refuse_dangling(entry: os.DirEntry[str]) -> None:
    """Refuses a link to text that is not there: without it the corpus would be another, and nobody told."""
    is_text = kinds.kind_of(entry.name) is not None and not entry.name.startswith(".")
    link = Path(entry.path)
    if is_text and entry.is_symlink() and not link.exists():
        raise UserError(
            f"data.path: {link} is a link to {link.readlink()}, which is not there",
            hint="mount or copy what it names, or remove the link",
        )


def _source_file(path: Path, name: str) -> SourceFile:
    about = path.stat()
    stamp = (about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
    return SourceFile(path, name, about.st_size, stamp, kinds.kind_of(path.name))


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"data.path: {path} does not exist", hint="a path is taken from the folder you stand in"
        )
    return UserError(f"data.path: {path} cannot be read: {error.strerror}", hint="see its owner and mode")


def _endings(files: list[SourceFile]) -> str:
    counts = Counter(kinds.ending_of(file.path.name) or "no ending" for file in files)
    more = len(counts) - 5
    seen = ", ".join(f"{count} x {ending}" for ending, count in counts.most_common(5))
    return f"{seen} and {more} other endings" if more > 0 else seen


def _count(files: list[SourceFile]) -> str:
    return f"{len(files)} file{'s' if len(files) != 1 else ''}"
