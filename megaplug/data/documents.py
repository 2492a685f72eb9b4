"""The documents of a corpus: one a file (``.txt``, ``.py``), one a line (``.jsonl``), one a row (tables).

What is no document is told to `Faults` and passed over; what to do about it is for the caller to say.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megaplug.data import kinds
from megaplug.data.compressed import Stream, open_stream
from megaplug.data.faults import Faults
from megaplug.data.shards import Shard, cut
from megaplug.data.sources import Corpus
from megaplug.errors import UserError

_PIECE = 1 << 20


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text in UTF-8; empty where there is none to tokenize and only ``num_read`` counts.
        num_read: Bytes of the corpus that were read for it, for a progress bar.
    """

    text: bytes
    num_read: int


def read_documents(corpus: Corpus, faults: Faults) -> Iterator[Document]:
    """Every document of the corpus, in the order of its files; see `read_shard`."""
    for shard in cut(corpus):
        part = Faults()
        yield from read_shard(shard, corpus.text_key, part)
        faults.append(part, faults.lines if shard.start else 0)
        faults.lines = part.lines + (faults.lines if shard.start else 0)


def read_shard(shard: Shard, text_key: str, faults: Faults) -> Iterator[Document]:
    """Every document of a shard, in order; empty ones and a byte-order mark are left out.

    Args:
        shard: What to read.
        text_key: The key of a line, or the column of a table, that holds the text.
        faults: Is told of what is no document; numbers of lines count from the beginning of the shard.

    Raises:
        UserError: A file cannot be read, cannot be decompressed, or is no table with such a column.
    """
    if shard.kind in (kinds.PARQUET, kinds.ARROW):
        from megaplug.data.tables import read_rows

        yield from (Document(text, size) for text, size in read_rows(shard, text_key, faults))
        return
    for path in map(Path, shard.paths):
        try:
            with open_stream(path) as stream:
                if shard.kind == kinds.LINES:
                    yield from _read_lines(stream, path, shard, text_key, faults)
                else:
                    yield from _read_whole(stream, path, faults)
        except OSError as error:
            raise UserError(
                f"data.path: {path} cannot be read: {error.strerror or error}", hint="see its owner and mode"
            ) from error


def _read_whole(stream: Stream, path: Path, faults: Faults) -> Iterator[Document]:
    text = stream.data.read()
    fault = _fault_of_utf8(text, 0)
    if fault:
        faults.add(str(path), "", 0, *fault)
        text = b""
    else:
        text = text.removeprefix(codecs.BOM_UTF8)
        faults.empty += not text
    yield Document(text, stream.num_read())


def _read_lines(
    stream: Stream, path: Path, shard: Shard, text_key: str, faults: Faults
) -> Iterator[Document]:
    position = _begin(stream.data, shard)
    stream.num_read()  # what lies before is counted by the shards that it belongs to
    if shard.stop and position >= shard.stop:
        return
    for line in stream.data:
        faults.lines += 1
        text = _text_of(line, path, position, faults, text_key)
        position += len(line)
        yield Document(text, stream.num_read())
        if shard.stop and position >= shard.stop:
            return


def _begin(stream: BinaryIO, shard: Shard) -> int:
    """Goes to the first line that begins inside the shard, and says where that is; its end if none does.

    A line that began before is passed over in pieces and no further than that: it may be longer than many
    shards.
    """
    if not shard.start:
        return 0
    position = shard.start - 1
    stream.seek(position)
    while position < shard.stop:
        piece = stream.readline(min(_PIECE, shard.stop - position))
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return position


def _fault_of_utf8(data: bytes, offset: int) -> tuple[str, str] | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        return (
            f"is not UTF-8: byte {data[error.start]:#04x} at offset {at} ({error.reason})",
            "convert it, for example with: iconv -f latin1 -t utf-8",
        )
    return None


def _text_of(line: bytes, path: Path, position: int, faults: Faults, text_key: str) -> bytes:
    """The text of a line; empty if it has none, which is counted unless the line is blank."""
    if not position:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        if line.strip():
            looks = f'a line looks like {{"{text_key}": "..."}}'
            fault = _fault_of_utf8(line, position) or (f"is not JSON: {error}", looks)
            faults.add(str(path), "line", faults.lines, *fault)
        return b""
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        faults.add(str(path), "line", faults.lines, *_fault_of_record(record, text_key))
        return b""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        what = f"holds half a character (a lone surrogate) at {error.start} of {text_key!r}"
        faults.add(str(path), "line", faults.lines, what)
        return b""
    faults.empty += not encoded
    return encoded


def _fault_of_record(record: object, text_key: str) -> tuple[str, str]:
    if not isinstance(record, dict):
        return f"is {_kind(record)}, not an object", f'a line looks like {{"{text_key}": "..."}}'
    hint = "name the key that holds the text with data.text_key="
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:10])) or "none"
        return f"has no key {text_key!r}; its keys are: {keys}", hint
    return f"holds {_kind(record[text_key])} under {text_key!r}, not a string", hint


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
