"""Rows of parquet and Arrow files, streamed block by block with pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megaplug.data import kinds
from megaplug.data.faults import Faults
from megaplug.data.libraries import optional
from megaplug.errors import UserError

if TYPE_CHECKING:
    from megaplug.data.shards import Shard

_ROWS_AT_ONCE = 1024
_ARROW_FILE = b"ARROW1"  # what Arrow's file format begins with; its stream format does not


def blocks(path: str, kind: str) -> list[int]:
    """Bytes of each row group of a parquet file, or of each batch of an Arrow file."""
    with _errors(path, kind):
        if kind == kinds.PARQUET:
            with optional("pyarrow.parquet", path).ParquetFile(path) as file:
                groups = range(file.metadata.num_row_groups)
                return [file.metadata.row_group(i).total_byte_size for i in groups]
        return [batch.nbytes for batch in _batches(path)]


def read_rows(shard: Shard, text_key: str, faults: Faults) -> Iterator[tuple[bytes, int]]:
    """The text of each row of a shard and the bytes that were read for it; empty where there is no text.

    Raises:
        UserError: pyarrow is not installed, the file is damaged, or has no such column of strings.
    """
    (path,) = shard.paths
    with _errors(path, shard.kind):
        parts = _of_parquet if shard.kind == kinds.PARQUET else _of_arrow
        weight = None
        for first_row, num_rows, column in parts(path, shard, text_key):
            if weight is None:
                weight = shard.size / max(1, num_rows)
            yield from _texts(column, path, first_row, text_key, faults, weight)


def _texts(
    column: Any, path: str, first_row: int, text_key: str, faults: Faults, weight: float
) -> Iterator[tuple[bytes, int]]:
    pyarrow = optional("pyarrow", path)
    told = 0.0
    for row, text in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), start=first_row + 1):
        told += weight
        size, told = int(told), told % 1
        try:
            if text is None:
                faults.add(path, "row", row, f"holds null under {text_key!r}, not a string")
            else:
                text.decode()
                faults.empty += not text
            yield text or b"", size
        except UnicodeDecodeError as error:
            faults.add(path, "row", row, f"is not UTF-8: byte {text[error.start]:#04x} at {error.start}")
            yield b"", size


def _of_parquet(path: str, shard: Shard, text_key: str) -> Iterator[tuple[int, int, Any]]:
    """Number of rows before, rows of the whole shard, and the column, of each handful of rows."""
    with optional("pyarrow.parquet", path).ParquetFile(path) as file:
        _check_column(file.schema_arrow, path, text_key)
        if file.metadata.num_row_groups < shard.stop:
            raise UserError(
                f"data.path: {path} changed while it was read: it has {file.metadata.num_row_groups} row "
                f"groups, and had {shard.stop}",
                hint="start again when it is still",
            )
        rows = [file.metadata.row_group(i).num_rows for i in range(shard.stop)]
        first = sum(rows[: shard.start])
        groups = list(range(shard.start, shard.stop))
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[text_key]):
            yield first, sum(rows[shard.start :]), _plain(batch.column(0))
            first += batch.num_rows


def _of_arrow(path: str, shard: Shard, text_key: str) -> Iterator[tuple[int, int, Any]]:
    """As `_of_parquet`."""
    chosen, first, before = [], 0, 0
    for number, batch in enumerate(_batches(path)):
        if number >= shard.stop:
            break
        if number >= shard.start:
            _check_column(batch.schema, path, text_key)
            chosen.append(batch.column(text_key))
        else:
            before += batch.num_rows
    whole = sum(map(len, chosen))
    for column in chosen:
        for start in range(0, len(column), _ROWS_AT_ONCE):
            yield before + first + start, whole, _plain(column.slice(start, _ROWS_AT_ONCE))
        first += len(column)


def _batches(path: str) -> Iterator[Any]:
    """The batches of an Arrow file, mapped into memory, not read."""
    pyarrow = optional("pyarrow", path)
    with pyarrow.memory_map(path) as source:
        if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


def _plain(column: Any) -> Any:
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _check_column(schema: Any, path: str, text_key: str) -> None:
    types = optional("pyarrow", path).types
    hint = "name the column that holds the text with data.text_key="
    if text_key not in schema.names:
        columns = ", ".join(map(repr, schema.names[:10])) or "none"
        raise UserError(
            f"data.path: {path} has no column {text_key!r}; its columns are: {columns}", hint=hint
        )
    kind = schema.field(text_key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"data.path: column {text_key!r} of {path} holds {kind}, not strings", hint=hint)


@contextlib.contextmanager
def _errors(path: str, kind: str) -> Iterator[None]:
    pyarrow = optional("pyarrow", path)
    try:
        yield
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.path: {path} is no {kind} file that can be read: {reason}",
            hint="it is damaged or cut off; write or copy it again",
        ) from error
    except OSError as error:
        raise UserError(f"data.path: {path} cannot be read: {error.strerror or error}") from error
