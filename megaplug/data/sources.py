"""Which files ``data.path`` stands for: the standard library, a file, or a folder of files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megaplug.errors import UserError
from megaplug.job.schema import DataConfig

STDLIB = "stdlib"
"""The value of ``data.path`` that means the sources of the running Python's standard library."""

ENDINGS = (".txt", ".jsonl")

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
    """

    path: Path
    name: str
    size: int
    stamp: tuple[int, int, int]


@dataclass(frozen=True)
class Corpus:
    """The files behind ``data.path``, sorted by name.

    Attributes:
        title: What it is called when a person reads of it.
        root: The file or folder.
        files: At least one.
        text_key: The key that holds the text in a line of a ``.jsonl`` file.
    """

    title: str
    root: Path
    files: tuple[SourceFile, ...]
    text_key: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def newest_ns(self) -> int:
        """The latest change of any file, in ns since 1970."""
        return max(max(file.stamp[:2]) for file in self.files)

    def listing(self) -> str:
        """Hex digest of names, sizes and stamps; differs whenever a file may have changed."""
        rows = [(file.name, file.size, *file.stamp) for file in self.files]
        return hashlib.sha256(json.dumps([self.text_key, rows]).encode()).hexdigest()


def find_corpus(data: DataConfig) -> Corpus:
    """Lists the files that ``data.path`` stands for.

    Hidden files and folders (a leading dot) are left out, as are files of a folder with other endings.

    Raises:
        UserError: There is no such path, it cannot be listed, its ending is not known, or no file is in it.
    """
    if data.path == STDLIB:
        return _find_stdlib(data)
    if not data.path:
        raise UserError("data.path: it is empty", hint="give a .txt or .jsonl file or folder, or stdlib")
    root = Path(data.path).expanduser().absolute()
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise _unreadable(root, error) from error
    if not stat.S_ISDIR(mode):
        if root.suffix.lower() not in ENDINGS:
            raise UserError(
                f"data.path: {root} ends in {root.suffix or 'nothing'!r}, not in a known kind of text",
                hint="give a .txt file, a .jsonl file, a folder of them, or stdlib",
            )
        if not stat.S_ISREG(mode):
            raise UserError(f"data.path: {root} is not a regular file", hint="copy its content into a file")
        return Corpus(root.name, root, (_source_file(root, root.name),), data.text_key)

    seen = list(_walk(root, lambda folder: not folder.startswith(".")))
    files = [f for f in seen if f.path.suffix.lower() in ENDINGS and not f.path.name.startswith(".")]
    if not files:
        raise UserError(
            f"data.path: no .txt or .jsonl file is in {root}{_endings_seen(seen)}",
            hint="give a .txt or .jsonl file, or a folder that holds some",
        )
    return _corpus(f"{root.name}/ ({_count(files)})", root, files, data.text_key)


def _find_stdlib(data: DataConfig) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _walk(root, lambda folder: folder not in _STDLIB_FOLDERS_LEFT_OUT)
    files = [
        f for f in found if f.path.suffix == ".py" and not f.path.name.startswith(_STDLIB_FILES_LEFT_OUT)
    ]
    if not files:
        raise UserError(
            f"data.path: this Python has no sources of its standard library in {root}",
            hint="set data.path to a .txt or .jsonl file or folder of your own",
        )
    title = f"Python {platform.python_version()} standard library ({_count(files)})"
    return _corpus(title, root, files, data.text_key)


def _corpus(title: str, root: Path, files: list[SourceFile], text_key: str) -> Corpus:
    return Corpus(title, root, tuple(sorted(files, key=lambda file: file.name)), text_key)


def _walk(root: Path, enter: Callable[[str], bool]) -> Iterator[SourceFile]:
    """Every regular file below ``root``; linked folders are entered once, so that no circle is endless."""
    entered: set[tuple[int, int]] = set()
    waiting = [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in entered:
                continue
            entered.add((about.st_dev, about.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if enter(entry.name):
                            waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))
                    elif entry.is_file():
                        yield _source_file(Path(entry.path), prefix + entry.name)
        except OSError as error:
            raise _unreadable(folder, error) from error


def _source_file(path: Path, name: str) -> SourceFile:
    about = path.stat()
    return SourceFile(path, name, about.st_size, (about.st_mtime_ns, about.st_ctime_ns, about.st_ino))


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"data.path: {path} does not exist", hint="a path is taken from the folder you stand in"
        )
    return UserError(f"data.path: {path} cannot be read: {error.strerror}", hint="see its owner and mode")


def _endings_seen(files: list[SourceFile]) -> str:
    counts = Counter(file.path.suffix.lower() or "no ending" for file in files)
    seen = ", ".join(f"{count} x {ending}" for ending, count in counts.most_common(5))
    return f" (there are: {seen})" if seen else " (it is empty)"


def _count(files: list[SourceFile]) -> str:
    return f"{len(files)} file{'s' if len(files) != 1 else ''}"
