"""Megatron's own ``.bin``/``.idx`` pairs as a source: checked, not copied; a split is an index of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaplug.data import cache
from megaplug.data.crew import Crew
from megaplug.data.indexed import IndexedTokens, read_indexed, write_index
from megaplug.data.progress import Progress
from megaplug.data.sources import Prefix
from megaplug.data.split import Shares, borders
from megaplug.data.tokenizers import Tokenizer
from megaplug.data.unigram import count_ids, unigram_loss
from megaplug.errors import UserError
from megaplug.job.facts import SPLITS

if TYPE_CHECKING:
    import numpy as np

_PART_IDS = 16_000_000  # what one task reads


def scan_prefix(prefix: Prefix, eod: int, crew: Crew, progress: Progress) -> dict[str, Any]:
    """Reads all ids of a pair once.

    Args:
        prefix: The pair.
        eod: The id that should end every document.
        crew: Does the work.
        progress: Is told how far it is.

    Returns:
        ``content``, a hex digest of ids and documents; ``least`` and ``largest`` id; ``num_unended``, the
        documents that do not end with ``eod``; ``num_documents``.

    Raises:
        UserError: The files contradict each other, or hold no ids.
    """
    import numpy as np

    pair = read_indexed(prefix.path)
    if not pair.num_tokens:
        raise UserError(f"data.path: there is no text in {prefix.path}.bin", hint="it holds no ids")
    dtype = pair.tokens.dtype
    progress.stage(f"reading {prefix.path.name}.bin", pair.tokens.nbytes)

    def tasks() -> Iterator[dict[str, Any]]:
        common = {"do": "scan", "path": str(prefix.bin.path), "dtype": dtype.name}
        end = pair.start + pair.num_tokens
        for first in range(pair.start, end, _PART_IDS):
            yield {**common, "first": first, "last": min(first + _PART_IDS, end)}

    results = list(crew.results(tasks(), progress.advance))
    hashed = hashlib.sha256(dtype.name.encode() + pair.lengths.astype("<i8").tobytes())
    for result in results:
        hashed.update(bytes.fromhex(result["digest"]))
    lasts = np.cumsum(pair.lengths)[pair.lengths > 0] - 1
    return {
        "content": hashed.hexdigest(),
        "least": min(result["least"] for result in results),
        "largest": max(result["largest"] for result in results),
        "num_unended": int((pair.tokens[lasts] != eod).sum()) + int((pair.lengths == 0).sum()),
        "num_documents": pair.num_documents,
    }


def check_ids(prefix: Prefix, scanned: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises `UserError` if a pair holds ids that the tokenizer lacks; says if documents have no end."""
    for id_ in (scanned["largest"], scanned["least"]):
        if not 0 <= id_ < tokenizer.vocab_size:
            raise UserError(
                f"data.path: {prefix.path}.bin holds the id {id_:,}, but the tokenizer has "
                f"{tokenizer.vocab_size:,} ids, 0 to {tokenizer.vocab_size - 1:,}",
                hint="name the tokenizer with which it was made: tokenizer=huggingface tokenizer.path=...",
            )
    if scanned["num_unended"]:
        cache.say(
            f"{scanned['num_unended']:,} of {scanned['num_documents']:,} documents of {prefix.path} do not "
            f"end with {tokenizer.eod}, the tokenizer's end of a document; they are used as they are"
        )


def build_views(
    folder: Path, prefix: Prefix, tokenizer: Tokenizer, shares: Shares, progress: Progress
) -> dict[str, Any]:
    """The splits of a pair, contiguous and in its own order: ``<split>.idx`` beside a link to its ``.bin``.

    Returns:
        What `megaplug.data.build.build_entry` returns, and ``prefixes`` if the pair is used whole.

    Raises:
        UserError: It cannot be split so.
    """
    pair = read_indexed(prefix.path)
    progress.stage(f"counting {prefix.path.name}.bin", pair.tokens.nbytes)
    entry: dict[str, Any] = {
        "num_tokens": dict.fromkeys(SPLITS, 0),
        "num_documents": dict.fromkeys(SPLITS, 0),
    }
    if shares[0] == 1:
        entry["prefixes"] = {"train": str(prefix.path)}
    counts = {}
    for split, begin, lengths in _parts(pair, shares):
        end = begin + int(lengths.sum())
        entry["num_tokens"][split], entry["num_documents"][split] = end - begin, lengths.size
        counts[split] = count_ids(pair.tokens[begin:end], tokenizer.vocab_size, progress.advance)
        if shares[0] < 1:
            write_index(folder / f"{split}.idx", pair.tokens.dtype.name, lengths, pair.start + begin)
            (folder / f"{split}.bin").symlink_to(prefix.bin.path.resolve())
    loss = unigram_loss(counts["train"], counts["valid"]) if "valid" in counts else None
    return {**entry, "unigram_loss": loss, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod}


def _parts(pair: IndexedTokens, shares: Shares) -> Iterator[tuple[str, int, np.ndarray]]:
    """Each split with a share, its first token, and the lengths of its documents, cut at the borders."""
    import numpy as np

    ends = np.cumsum(pair.lengths)
    edges = (0, *borders(pair.num_tokens, shares))
    for split, begin, end in zip(SPLITS, edges, edges[1:], strict=False):
        if end > begin:
            inner = ends[(ends > begin) & (ends < end)]
            yield split, begin, np.diff(np.concatenate(([begin], inner, [end])))


def listing_key(prefix: Prefix, listed: str, shares: Shares, tokenizer: Tokenizer) -> str:
    """The name of the entry that holds the views of a pair: they end when its files change or move."""
    parts = ["views", cache.FORMAT, str(prefix.path), listed, tokenizer.fingerprint, [str(s) for s in shares]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
