"""Builds one entry of the cache: encode, shuffle, cut, write with Megatron's own writer, count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaplug.data.cache import cache_errors
from megaplug.data.documents import read_documents
from megaplug.data.progress import Progress
from megaplug.data.sources import Corpus
from megaplug.data.split import Shares, borders, pieces
from megaplug.data.tokenizers import Tokenizer
from megaplug.data.unigram import count_tokens, unigram_loss
from megaplug.data.writer import PIECES, RAW, write_splits
from megaplug.errors import UserError
from megaplug.job.facts import SPLITS

if TYPE_CHECKING:
    import numpy as np

_BATCH_BYTES = 1_000_000
_BATCH_DOCUMENTS = 1_000
_LONGEST = 2**31 - 1  # the length of a document is an int32 in Megatron's index


def digest_documents(corpus: Corpus, progress: Progress) -> list[bytes]:
    """A digest of every document, in the order of the corpus.

    Raises:
        UserError: The corpus cannot be read, or holds no text.
    """
    progress.stage(f"reading {corpus.title}", corpus.size)
    digests = []
    for document in read_documents(corpus):
        digests.append(_digest(document.text))
        progress.advance(document.num_read)
    if not digests:
        raise UserError(
            f"data.path: there is no text in {corpus.root}", hint="every file or line of it is empty"
        )
    return digests


def content_hash(digests: Sequence[bytes]) -> str:
    """Hex digest of a set of documents: their files' names, places and order do not count."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def build_entry(
    folder: Path,
    corpus: Corpus,
    digests: Sequence[bytes],
    tokenizer: Tokenizer,
    shares: Shares,
    progress: Progress,
) -> dict[str, Any]:
    """Writes ``<split>.bin`` and ``.idx`` for every split that has a share.

    Documents are put in the order of their digests, which is a shuffle that depends on nothing but
    their text, laid end to end, and cut into splits at exact numbers of tokens.

    Args:
        folder: An empty folder.
        corpus: Where the text is.
        digests: As `digest_documents` gave them.
        tokenizer: Ends every document with its ``eod``.
        shares: Of train, valid and test.
        progress: Is told how far it is.

    Returns:
        ``num_tokens`` and ``num_documents`` by split, ``unigram_loss``, ``vocab_size`` and ``eod``.

    Raises:
        UserError: The corpus has changed meanwhile, cannot be split so, or the disk is full.
    """
    import numpy as np

    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    with cache_errors(folder):
        lengths = _encode(folder / RAW, corpus, digests, tokenizer, dtype, progress)
        plan = _plan(lengths, digests, shares)
        np.save(folder / PIECES, plan)
        progress.stage("writing Megatron's dataset", int(lengths.sum()) * np.dtype(dtype).itemsize)
        write_splits(folder, dtype.__name__, progress.advance)
        num_documents = {split: int((plan[:, 0] == i).sum()) for i, split in enumerate(SPLITS)}
        counts = {
            split: count_tokens(folder / f"{split}.bin", dtype, tokenizer.vocab_size)
            for split, number in num_documents.items()
            if number
        }
    return {
        "num_tokens": {split: int(counts[split].sum()) if split in counts else 0 for split in SPLITS},
        "num_documents": num_documents,
        "unigram_loss": unigram_loss(counts["train"], counts["valid"]) if "valid" in counts else None,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }


def _encode(
    raw: Path,
    corpus: Corpus,
    digests: Sequence[bytes],
    tokenizer: Tokenizer,
    dtype: type[np.integer],
    progress: Progress,
) -> np.ndarray:
    """Writes all ids end to end; gives the number of ids of each document, int64 ``[num_documents]``."""
    import numpy as np

    progress.stage(f"tokenizing {corpus.title}", corpus.size)
    lengths: list[int] = []
    with raw.open("wb") as stream:
        for batch in _batches(corpus, digests, progress):
            for ids in tokenizer.encode_documents(batch):
                if ids.size > _LONGEST:
                    raise UserError(
                        f"data.path: a document of {corpus.root} has {ids.size:,} tokens, "
                        f"more than {_LONGEST:,}",
                        hint="cut it into several files",
                    )
                lengths.append(ids.size)
                stream.write(ids.astype(dtype, copy=False).tobytes())
    return np.array(lengths, dtype=np.int64)


def _batches(corpus: Corpus, digests: Sequence[bytes], progress: Progress) -> Iterator[list[bytes]]:
    """Texts in handfuls, each checked to be what it was when its digest was taken."""
    changed = UserError(
        f"data.path: {corpus.root} changed while it was read", hint="start again when it is still"
    )
    batch: list[bytes] = []
    size = number = 0
    for document in read_documents(corpus):
        if number >= len(digests) or _digest(document.text) != digests[number]:
            raise changed
        number += 1
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
        progress.advance(document.num_read)
    if number != len(digests):
        raise changed
    if batch:
        yield batch


def _plan(lengths: np.ndarray, digests: Sequence[bytes], shares: Shares) -> np.ndarray:
    """Which tokens go where: the array that `write_splits` reads."""
    import numpy as np

    order = sorted(range(len(digests)), key=digests.__getitem__)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))[order].tolist()
    ends = borders(int(lengths.sum()), shares)
    rows = [
        (SPLITS.index(piece.split), starts[piece.document] + piece.start, piece.stop - piece.start)
        for piece in pieces(lengths[order].tolist(), ends)
    ]
    return np.array(rows, dtype=np.int64)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()
