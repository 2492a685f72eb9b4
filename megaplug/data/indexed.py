"""Reads a ``.bin``/``.idx`` pair without Megatron, whose own reader brings torch with it.

The format is that of ``megatron.core.datasets.indexed_dataset``: the index holds the length of every
sequence, where it begins in the ``.bin``, and which begin a document; the ``.bin`` holds all ids end to end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaplug.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_HEADER = b"MMIDIDX\x00\x00"
_FIELDS = struct.Struct("<9sQBQQ")  # header, version, type of the ids, number of sequences, of borders
# Megatron's numbers for numpy's types; ids of text are whole numbers.
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass(frozen=True)
class IndexedTokens:
    """A tokenized data set as it lies on disk.

    Attributes:
        prefix: Its path without ``.bin`` or ``.idx``.
        tokens: Memory map of all ids, end to end: ``[num_tokens]``.
        lengths: Number of tokens of each document: int64 ``[num_documents]``.
    """

    prefix: Path
    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def num_tokens(self) -> int:
        """How many ids there are."""
        return int(self.tokens.size)

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return int(self.lengths.size)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document: ``[num_tokens]``."""
        start = int(self.lengths[:number].sum())
        return self.tokens[start : start + int(self.lengths[number])]


def is_prefix(path: Path) -> bool:
    """Whether a path names a ``.bin``/``.idx`` pair: without an ending, or one of its two files."""
    bare = bare_prefix(path)
    return bare.with_name(f"{bare.name}.bin").is_file() and bare.with_name(f"{bare.name}.idx").is_file()


def bare_prefix(path: Path) -> Path:
    """The path without ``.bin`` or ``.idx``."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def read_indexed(path: Path, key: str = "data.path") -> IndexedTokens:
    """Opens a pair and checks that both files belong together.

    Args:
        path: The prefix, or one of the two files.
        key: The configuration key that a message names.

    Raises:
        UserError: A file is missing, is none of Megatron's, or is cut off.
    """
    import numpy as np

    bare = bare_prefix(path)
    files = {ending: bare.with_name(f"{bare.name}.{ending}") for ending in ("bin", "idx")}
    try:
        size = files["bin"].stat().st_size
        with files["idx"].open("rb") as stream:
            start = stream.read(_FIELDS.size)
            whole = files["idx"].stat().st_size
            name, num_sequences, num_borders = _header(start, files["idx"], key)
            wanted = _FIELDS.size + 12 * num_sequences + 8 * num_borders
            if whole < wanted:
                raise UserError(
                    f"{key}: {files['idx']} is cut off: {whole:,} bytes, {wanted:,} are needed", hint=_AGAIN
                )
            lengths = np.fromfile(stream, dtype=np.int32, count=num_sequences).astype(np.int64)
            stream.seek(8 * num_sequences, 1)
            borders = np.fromfile(stream, dtype=np.int64, count=num_borders)
        dtype = np.dtype(name)
        if int(lengths.sum()) * dtype.itemsize != size:
            raise UserError(
                f"{key}: {files['bin']} has {size:,} bytes, but its index speaks of "
                f"{int(lengths.sum()):,} ids of {dtype.itemsize} bytes",
                hint=_AGAIN,
            )
        ends = np.concatenate(([0], np.cumsum(lengths)))
        if (
            not borders.size
            or borders.min() < 0
            or borders.max() > num_sequences
            or np.any(borders[1:] < borders[:-1])
        ):
            raise UserError(f"{key}: the documents in {files['idx']} are not in order", hint=_AGAIN)
        tokens = np.memmap(files["bin"], dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)
    except OSError as error:
        raise UserError(
            f"{key}: {error.filename or bare} cannot be read: {error.strerror}",
            hint="a Megatron data set is a .bin and an .idx file of one name; give that name",
        ) from error
    return IndexedTokens(bare, tokens, np.diff(ends[borders]))


_AGAIN = "copy or write it again, both files together"


def _header(start: bytes, file: Path, key: str) -> tuple[str, int, int]:
    """Name of the type of the ids, number of sequences, number of borders between documents."""
    if len(start) < _FIELDS.size or not start.startswith(_HEADER):
        raise UserError(f"{key}: {file} is not an index of Megatron's", hint="it begins with MMIDIDX")
    _, version, code, num_sequences, num_borders = _FIELDS.unpack(start)
    if version != 1 or code not in _TYPES:
        raise UserError(
            f"{key}: {file} holds version {version} and ids of type {code}",
            hint="version 1 with whole numbers is read",
        )
    return _TYPES[code], num_sequences, num_borders
