"""The documents of a corpus: one file each for ``.txt`` and ``.py``, one line each for ``.jsonl``."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megaplug.data.sources import Corpus, SourceFile
from megaplug.errors import UserError


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text in UTF-8, never empty.
        num_read: Bytes of the corpus that were read for it, for a progress bar.
    """

    text: bytes
    num_read: int


def read_documents(corpus: Corpus) -> Iterator[Document]:
    """Every document of the corpus, in the order of its files; empty ones and a byte-order mark are left out.

    Raises:
        UserError: A file cannot be read, is not UTF-8, or has a line that is not JSON with the text's key.
    """
    for file in corpus.files:
        try:
            with file.path.open("rb") as stream:
                if file.path.suffix.lower() == ".jsonl":
                    yield from _read_lines(stream, file, corpus.text_key)
                else:
                    yield from _read_whole(stream, file)
        except OSError as error:
            raise UserError(
                f"data.path: {file.path} cannot be read: {error.strerror}", hint="see its owner and mode"
            ) from error


def _read_whole(stream: BinaryIO, file: SourceFile) -> Iterator[Document]:
    text = stream.read()
    _decode(text, file.path, 0)
    num_read = len(text)
    text = text.removeprefix(codecs.BOM_UTF8)
    if text:
        yield Document(text, num_read)


def _read_lines(stream: BinaryIO, file: SourceFile, text_key: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        record = _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, file.path, offset)
        if record.strip():
            text = _text_of(record, f"{file.path}:{number}", text_key)
            if text:
                yield Document(text, len(line))
        offset += len(line)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(
            f"data.path: {path} is not UTF-8: byte {data[error.start]:#04x} at offset {at} ({error.reason})",
            hint="convert it, for example with: iconv -f latin1 -t utf-8",
        ) from error


def _text_of(line: str, where: str, text_key: str) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.path: {where} is not JSON: {error}", hint=f'a line looks like {{"{text_key}": "..."}}'
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"data.path: {where} is {_kind(record)}, not an object",
            hint=f'a line looks like {{"{text_key}": "..."}}',
        )
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise UserError(
            f"data.path: {where} has no key {text_key!r}; its keys are: {keys}",
            hint="name the key that holds the text with data.text_key=",
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(
            f"data.path: {where}: {text_key!r} is {_kind(text)}, not a string",
            hint="name the key that holds the text with data.text_key=",
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"data.path: {where}: {text_key!r} holds half a character (a lone surrogate) at {error.start}"
        ) from error


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
