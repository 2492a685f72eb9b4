"""Reads and writes ``.bin``/``.idx`` pairs without Megatron, whose own code for it brings torch with it.

The format is that of ``megatron.core.datasets.indexed_dataset``: the index holds the length of every
sequence, where it begins in the ``.bin``, and which begin a document; the ids lie end to end. A test
holds that an index written here is byte for byte that of Megatron's builder.
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
        tokens: Memory map of all its ids, end to end: ``[num_tokens]``.
        lengths: Number of tokens of each document: int64 ``[num_documents]``.
        start: The id of the ``.bin`` with which they begin; 0 unless this is a part of it.
    """

    prefix: Path
    tokens: np.ndarray
    lengths: np.ndarray
    start: int = 0

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
            pointers = np.fromfile(stream, dtype=np.int64, count=num_sequences)
            borders = np.fromfile(stream, dtype=np.int64, count=num_borders)
        dtype = np.dtype(name)
        num_tokens = int(lengths.sum())
        begin = int(pointers[0]) if num_sequences else 0
        end = begin + num_tokens * dtype.itemsize
        # The splits of a prefix share one .bin, through links.
        if end > size or ((begin, end) != (0, size) and not files["bin"].is_symlink()):
            raise UserError(
                f"{key}: {files['bin']} has {size:,} bytes, but its index speaks of "
                f"{num_tokens:,} ids of {dtype.itemsize} bytes",
                hint=_AGAIN,
            )
        ends = np.concatenate(([0], np.cumsum(lengths)))
        if not np.array_equal(pointers, begin + ends[:-1] * dtype.itemsize):
            raise UserError(f"{key}: the ids that {files['idx']} names do not lie end to end", hint=_AGAIN)
        if (
            not borders.size
            or borders[0] != 0
            or borders[-1] != num_sequences
            or np.any(borders[1:] < borders[:-1])
        ):
            raise UserError(
                f"{key}: the documents in {files['idx']} are not in order, or do not end with its "
                f"{num_sequences:,} sequences",
                hint=_AGAIN,
            )
        tokens = np.zeros(0, dtype=dtype)
        if num_tokens:
            tokens = np.memmap(files["bin"], dtype=dtype, mode="r", offset=begin, shape=(num_tokens,))
    except OSError as error:
        raise UserError(
            f"{key}: {error.filename or bare} cannot be read: {error.strerror}",
            hint="a Megatron data set is a .bin and an .idx file of one name; give that name",
        ) from error
    return IndexedTokens(bare, tokens, np.diff(ends[borders]), begin // dtype.itemsize)


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


def write_index(path: Path, dtype: str, lengths: np.ndarray, start: int = 0) -> None:
    """Writes an ``.idx`` in which every sequence is a document.

    Args:
        path: The file.
        dtype: numpy's name for the type of the ids.
        lengths: Tokens of each document, which lie end to end: ``[num_documents]``, each below 2**31.
        start: The token of the ``.bin`` with which the first begins.
    """
    import numpy as np

    code = next(code for code, name in _TYPES.items() if name == dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = (start + ends - lengths) * np.dtype(dtype).itemsize
    borders = np.arange(lengths.size + 1, dtype=np.int64)
    with path.open("wb") as stream:
        stream.write(_FIELDS.pack(_HEADER, 1, code, lengths.size, borders.size))
        for array in (lengths.astype(np.int32), pointers.astype(np.int64), borders):
            array.tofile(stream)
