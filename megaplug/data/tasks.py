"""What is done with a part of a corpus, in this process or in another: digest, tokenize, gather, scan.

A task and its result are plain values that JSON can hold; arrays travel as base64. No result depends on which
process has made it, nor in which order.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megaplug.data.documents import read_shard
from megaplug.data.faults import Faults
from megaplug.data.shards import Shard
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

if TYPE_CHECKING:
    import numpy as np

    from megaplug.data.tokenizers import Tokenizer

Tell = Callable[[int], None]
"""Is told numbers of bytes done."""

DIGEST_BYTES = 16
_BATCH_BYTES = 1_000_000
_BATCH_DOCUMENTS = 1_000
_LONGEST = 2**31 - 1  # the length of a document is an int32 in Megatron's index
_IDS_AT_ONCE = 1_000_000
_SHOWN = 40  # characters of a document that is named


class Desk:
    """Where tasks are done, one after the other.

    Args:
        number: Of this desk; no other that writes into the same folder may have it.
        tokenizer: As configured; it is loaded when it is needed.
    """

    def __init__(self, number: int, tokenizer: TokenizerConfig) -> None:
        self.number = number
        self._config = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._raw: tuple[str, BinaryIO] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this desk."""
        if self._tokenizer is None:
            from megaplug.data.tokenizers import load_tokenizer

            self._tokenizer = load_tokenizer(self._config)
        return self._tokenizer

    def do(self, task: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """Does what the task's ``do`` names, and gives its result."""
        doing = {"digest": self._digest, "encode": self._encode, "gather": _gather, "scan": _scan}
        return doing[task["do"]](task, tell)

    def close(self) -> None:
        """Closes what is open."""
        if self._raw is not None:
            self._raw[1].close()
        self._raw = None

    def _digest(self, task: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """``shard``, ``text_key`` -> ``digests`` of its documents, ``faults``."""
        faults, digests = Faults(), bytearray()
        for document in read_shard(Shard(**task["shard"]), task["text_key"], faults):
            if document.text:
                digests += digest(document.text)
            tell(document.num_read)
        return {"digests": pack(digests), "faults": faults.to_dict()}

    def _encode(self, task: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """Tokenizes: ``digests``, ``lengths``, ``file``, ``first``.

        Of ``shard``, ``text_key``, ``folder``, ``dtype``, and ``tokenizer``, the fingerprint of the one that
        is meant: its file may have changed since. The ids go to the end of this desk's own file
        ``raw-<file>``, the first of them at ``first``; ``lengths`` are the numbers of ids of each document,
        int64.
        """
        import numpy as np

        if self.tokenizer.fingerprint != task["tokenizer"]:
            raise UserError(
                f"tokenizer.path: {self._config.path} changed while the text was read",
                hint="start again when it is still",
            )
        raw, dtype = self._raw_file(task["folder"]), np.dtype(task["dtype"])
        first = raw.tell() // dtype.itemsize
        shard = Shard(**task["shard"])
        digests, lengths = bytearray(), []
        batch: list[bytes] = []
        files: list[str] = []
        size = 0

        def put() -> None:
            for file, ids in zip(files, _encoded(self.tokenizer, batch, files), strict=True):
                if ids.size > _LONGEST:
                    raise UserError(
                        f"data.path: a document of {file} has {ids.size:,} tokens, more than {_LONGEST:,}",
                        hint="cut it into several files",
                    )
                lengths.append(ids.size)
                raw.write(memoryview(ids.astype(dtype, copy=False)).cast("B"))
            batch.clear()
            files.clear()

        for number, document in enumerate(read_shard(shard, task["text_key"], Faults())):
            if document.text:
                digests += digest(document.text)
                batch.append(document.text)
                # A shard of several files has one document in each.
                files.append(shard.paths[number if len(shard.paths) > 1 else 0])
                size += len(document.text)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                put()
                size = 0
            tell(document.num_read)
        put()
        raw.flush()
        packed = pack(np.array(lengths, dtype=np.int64).tobytes())
        return {"digests": pack(digests), "lengths": packed, "file": self.number, "first": first}

    def _raw_file(self, folder: str) -> BinaryIO:
        if self._raw is None or self._raw[0] != folder:
            self.close()
            self._raw = folder, raw_path(Path(folder), self.number).open("ab")
        return self._raw[1]


def raw_path(folder: Path, number: int) -> Path:
    """Where a desk puts its ids."""
    return folder / f"raw-{number}"


def digest(text: bytes) -> bytes:
    """What identifies a document: `DIGEST_BYTES` bytes."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def pack(data: bytes | bytearray) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode()


def unpack(text: str) -> bytes:
    """What `pack` was given."""
    return base64.b64decode(text)


def _encoded(tokenizer: Tokenizer, documents: list[bytes], files: list[str]) -> list[np.ndarray]:
    """Ids of documents; one that the tokenizer's library raises on is a `UserError` that shows it.

    Args:
        tokenizer: Encodes them.
        documents: In UTF-8.
        files: Of each document.
    """
    try:
        return tokenizer.encode_documents(documents)
    except UserError:
        raise
    except Exception:  # libraries raise nothing narrower
        for file, text in zip(files, documents, strict=True):
            try:
                tokenizer.encode_documents([text])
            except Exception as error:
                start = text[: 4 * _SHOWN].decode(errors="ignore")[:_SHOWN]
                raise UserError(
                    f"data.path: a document of {file}, {len(text):,} bytes that begin with {start!r}, "
                    f"cannot be tokenized: {str(error) or type(error).__name__}",
                    hint="take it out or cut it into several, or choose a tokenizer that can",
                ) from error
        raise


def _gather(task: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """``pieces``, ``first``, ``last``, ``out``, ``at``, ``dtype``: puts pieces of raw files end to end.

    ``pieces`` is a ``.npy`` of int64 ``[num_pieces, 3]``: raw file, first id, number of ids. Those from
    ``first`` up to ``last`` go to the file ``out`` from its id ``at`` on. Gives ``counts``, how often each id
    below ``vocab_size`` occurs.
    """
    import numpy as np

    out, dtype = Path(task["out"]), np.dtype(task["dtype"])
    pieces = np.load(task["pieces"], mmap_mode="r")[task["first"] : task["last"]]
    raws = {
        int(n): np.memmap(raw_path(out.parent, n), dtype=dtype, mode="r") for n in np.unique(pieces[:, 0])
    }
    counts = np.zeros(task["vocab_size"], dtype=np.int64)
    waiting: list[np.ndarray] = []
    size = 0
    with out.open("r+b") as stream:
        stream.seek(task["at"] * dtype.itemsize)

        def put() -> None:
            ids = np.concatenate(waiting)
            stream.write(memoryview(ids).cast("B"))
            np.add(counts, np.bincount(ids, minlength=counts.size), out=counts)
            waiting.clear()
            tell(ids.nbytes)

        for number, start, length in pieces.tolist():
            for begin in range(start, start + length, _IDS_AT_ONCE):
                ids = raws[number][begin : min(begin + _IDS_AT_ONCE, start + length)]
                waiting.append(ids)
                size += ids.size
                if size >= _IDS_AT_ONCE:
                    put()
                    size = 0
        if waiting:
            put()
    return {"counts": pack(counts.tobytes())}


def _scan(task: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Reads ids ``first`` up to ``last`` of the file ``path``: ``digest``, ``least`` and ``largest``."""
    import numpy as np

    dtype = np.dtype(task["dtype"])
    hashed, least, largest = hashlib.blake2b(digest_size=DIGEST_BYTES), 0, 0
    with Path(task["path"]).open("rb") as stream:
        stream.seek(task["first"] * dtype.itemsize)
        left = task["last"] - task["first"]
        while left:
            ids = np.fromfile(stream, dtype=dtype, count=min(left, _IDS_AT_ONCE))
            if not ids.size:
                raise UserError(f"data.path: {task['path']} became shorter while it was read")
            hashed.update(memoryview(ids).cast("B"))
            least, largest = min(least, int(ids.min())), max(largest, int(ids.max()))
            left -= ids.size
            tell(ids.nbytes)
    return {"digest": hashed.hexdigest(), "least": least, "largest": largest}


def tokenizer_values(config: TokenizerConfig) -> dict[str, Any]:
    """A tokenizer's configuration as plain values."""
    return dataclasses.asdict(config)
