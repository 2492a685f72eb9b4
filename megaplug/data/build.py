"""Builds one entry of the cache from text: encode, shuffle, cut, write as Megatron reads it, count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import pairwise, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaplug.data.cache import cache_errors
from megaplug.data.crew import Crew
from megaplug.data.faults import Faults
from megaplug.data.indexed import write_index
from megaplug.data.progress import Progress
from megaplug.data.shards import Shard, cut
from megaplug.data.sources import Corpus
from megaplug.data.split import Shares, borders
from megaplug.data.tasks import DIGEST_BYTES, raw_path, unpack
from megaplug.data.tokenizers import Tokenizer
from megaplug.data.unigram import unigram_loss
from megaplug.errors import UserError
from megaplug.job.facts import SPLITS

if TYPE_CHECKING:
    import numpy as np

_PART_IDS = 8_000_000  # what one task puts in place


def digest_documents(corpus: Corpus, crew: Crew, progress: Progress) -> tuple[np.ndarray, Faults]:
    """A digest of every document in the order of the corpus, and what was no document.

    Returns:
        uint8 ``[num_documents, 16]``, and the faults.

    Raises:
        UserError: The corpus cannot be read.
    """
    progress.stage(f"reading {corpus.title}", corpus.size)
    shards, same = tee(cut(corpus))
    tasks = _each(corpus, shards, {"do": "digest"})
    faults, digests = Faults(), []
    for shard, result in zip(same, crew.results(tasks, progress.advance), strict=True):
        digests.append(_array_of_digests(result))
        before = faults.lines if shard.start else 0
        part = Faults.from_dict(result["faults"])
        faults.append(part, before)
        faults.lines = before + part.lines
    return _joined(digests), faults


def content_hash(digests: np.ndarray) -> str:
    """Hex digest of a set of documents: their files' names, places and order do not count."""
    return hashlib.sha256(digests[_order(digests)].tobytes()).hexdigest()


def changed(corpus: Corpus) -> UserError:
    """What is raised where a corpus is not what it was when it was read before."""
    return UserError(
        f"data.path: {corpus.root} changed while it was read", hint="start again when it is still"
    )


def build_entry(
    folder: Path,
    corpus: Corpus,
    digests: np.ndarray,
    tokenizer: Tokenizer,
    shares: Shares,
    crew: Crew,
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
        crew: Does the work.
        progress: Is told how far it is.

    Returns:
        ``num_tokens`` and ``num_documents`` by split, ``unigram_loss``, ``vocab_size`` and ``eod``.

    Raises:
        UserError: The corpus or the tokenizer's file has changed meanwhile, it cannot be split so, or the
            disk is full.
    """
    import numpy as np

    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "int32"
    with cache_errors(folder):
        pieces = _encode(folder, corpus, digests, dtype, tokenizer.fingerprint, crew, progress)
        ends = borders(int(pieces[:, 2].sum()), shares)
        progress.stage(f"shuffling {corpus.title}", ends[-1] * np.dtype(dtype).itemsize)
        counts = {}
        for split, begin, end in zip(SPLITS, (0, *ends[:2]), ends, strict=True):
            if end > begin:
                of_split = _between(pieces, begin, end)
                write_index(folder / f"{split}.idx", dtype, of_split[:, 2])
                gathered = _gather(folder, split, of_split, dtype, tokenizer.vocab_size, crew, progress)
                counts[split] = of_split.shape[0], gathered
        for number in np.unique(pieces[:, 0]).tolist():
            raw_path(folder, number).unlink()
    return {
        "num_tokens": {split: int(counts[split][1].sum()) if split in counts else 0 for split in SPLITS},
        "num_documents": {split: counts[split][0] if split in counts else 0 for split in SPLITS},
        "unigram_loss": unigram_loss(counts["train"][1], counts["valid"][1]) if "valid" in counts else None,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }


def _encode(
    folder: Path,
    corpus: Corpus,
    digests: np.ndarray,
    dtype: str,
    tokenizer: str,
    crew: Crew,
    progress: Progress,
) -> np.ndarray:
    """Tokenizes all documents: raw file, first id and number of ids of each, int64 ``[num_documents, 3]``.

    The rows are shuffled; the documents are checked to be what they were when their digests were taken.
    """
    import numpy as np

    progress.stage(f"tokenizing {corpus.title}", corpus.size)
    common = {"do": "encode", "folder": str(folder), "dtype": dtype, "tokenizer": tokenizer}
    tasks = _each(corpus, cut(corpus), common)
    rows, number = [], 0
    for result in crew.results(tasks, progress.advance):
        found = _array_of_digests(result)
        if not np.array_equal(found, digests[number : number + len(found)]):
            raise changed(corpus)
        number += len(found)
        lengths = np.frombuffer(unpack(result["lengths"]), dtype=np.int64)
        block = np.empty((len(lengths), 3), dtype=np.int64)
        block[:, 0] = result["file"]
        block[:, 1] = result["first"] + np.cumsum(lengths) - lengths
        block[:, 2] = lengths
        rows.append(block)
    if number != len(digests):
        raise changed(corpus)
    return np.concatenate(rows)[_order(digests)]


def _gather(
    folder: Path, split: str, pieces: np.ndarray, dtype: str, vocab_size: int, crew: Crew, progress: Progress
) -> np.ndarray:
    """Writes the ``.bin`` of a split; gives how often each id occurs in it, int64 ``[vocab_size]``."""
    import numpy as np

    table, out = folder / f"{split}.npy", folder / f"{split}.bin"
    np.save(table, pieces)
    out.touch()
    ends = np.cumsum(pieces[:, 2])
    cuts = np.searchsorted(ends, np.arange(_PART_IDS, int(ends[-1]), _PART_IDS))
    firsts = np.unique(np.concatenate(([0], cuts, [len(pieces)]))).tolist()

    def tasks() -> Iterator[dict[str, Any]]:
        common = {"do": "gather", "pieces": str(table), "out": str(out), "dtype": dtype}
        for first, last in pairwise(firsts):
            at = int(ends[first - 1]) if first else 0
            yield {**common, "vocab_size": vocab_size, "first": first, "last": last, "at": at}

    counts = np.zeros(vocab_size, dtype=np.int64)
    for result in crew.results(tasks(), progress.advance):
        counts += np.frombuffer(unpack(result["counts"]), dtype=np.int64)
    table.unlink()
    return counts


def _between(pieces: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The pieces that lie in tokens ``begin`` up to ``end`` of all, those at the borders cut."""
    import numpy as np

    ends = np.cumsum(pieces[:, 2])
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(ends, end, side="left"))
    chosen = pieces[first : last + 1].copy()
    chosen[-1, 2] -= ends[last] - end
    before = begin - (ends[first] - pieces[first, 2])
    chosen[0, 1] += before
    chosen[0, 2] -= before
    return chosen


def _each(corpus: Corpus, shards: Iterable[Shard], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield {**common, "shard": shard.to_dict(), "text_key": corpus.text_key}


def _array_of_digests(result: dict[str, Any]) -> np.ndarray:
    import numpy as np

    return np.frombuffer(unpack(result["digests"]), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _joined(digests: Iterable[np.ndarray]) -> np.ndarray:
    import numpy as np

    return np.concatenate([np.empty((0, DIGEST_BYTES), dtype=np.uint8), *digests])


def _order(digests: np.ndarray) -> np.ndarray:
    """The numbers of the documents in the order of their digests; equal ones as they come."""
    import numpy as np

    words = np.ascontiguousarray(digests).view(">u8")
    return np.lexsort((words[:, 1], words[:, 0]))
