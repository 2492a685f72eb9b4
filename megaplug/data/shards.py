"""Cuts a corpus into parts that can be read one by one; the cut depends on nothing but the files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from megaplug.data import kinds
from megaplug.data.sources import Corpus, SourceFile

SHARD_BYTES = 8_000_000


@dataclass(frozen=True)
class Shard:
    """A part of a corpus.

    Attributes:
        paths: Its files; more than one only where each is one document.
        kind: One of `megaplug.data.kinds`.
        start: Where it begins in its one file: a byte of lines, a row group of parquet, a batch of Arrow.
        stop: Where it ends; 0 for the end of the file.
        size: Bytes to be read, about.
    """

    paths: tuple[str, ...]
    kind: str
    start: int
    stop: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values, from which it can be made anew."""
        return asdict(self)


def cut(corpus: Corpus) -> Iterator[Shard]:
    """The shards of a corpus, in the order of its files."""
    together: list[SourceFile] = []
    size = 0
    for file in corpus.files:
        if together and (file.kind != kinds.TEXT or size >= SHARD_BYTES):
            yield from _of_texts(together)
            together, size = [], 0
        if file.kind == kinds.TEXT:
            together.append(file)
            size += file.size
        elif file.kind == kinds.LINES:
            yield from _of_lines(file)
        else:
            from megaplug.data.tables import blocks

            yield from _of_blocks(file, blocks(str(file.path), str(file.kind)))
    yield from _of_texts(together)


def _of_texts(files: list[SourceFile]) -> Iterator[Shard]:
    if files:
        yield Shard(tuple(str(f.path) for f in files), kinds.TEXT, 0, 0, sum(f.size for f in files))


def _of_lines(file: SourceFile) -> Iterator[Shard]:
    if kinds.is_compressed(file.path.name):
        yield Shard((str(file.path),), kinds.LINES, 0, 0, file.size)
        return
    starts = [*range(0, file.size, SHARD_BYTES), file.size]
    for start, stop in pairwise(starts):
        yield Shard((str(file.path),), kinds.LINES, start, stop, stop - start)


def _of_blocks(file: SourceFile, sizes: list[int]) -> Iterator[Shard]:
    """Whole blocks of a table together, up to the size of a shard; their sizes add up to that of the file."""
    whole, start, size = max(1, sum(sizes)), 0, 0
    for number, block in enumerate(sizes, start=1):
        size += block
        if size >= SHARD_BYTES or number == len(sizes):
            part = size * file.size // whole
            yield Shard((str(file.path),), str(file.kind), start, number, part)
            start, size = number, 0
