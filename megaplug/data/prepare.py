"""``prepare(job)``: the corpus of a job as Megatron reads it, built once and found again by its content."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from megaplug.data import cache
from megaplug.data.build import build_entry, content_hash, digest_documents
from megaplug.data.progress import Progress, progress
from megaplug.data.sources import Corpus, find_corpus
from megaplug.data.split import Shares, parse_split
from megaplug.data.tokenizers import Tokenizer, load_tokenizer
from megaplug.errors import Problem, UserError
from megaplug.job.facts import DataFacts
from megaplug.job.schema import Job


def prepare(job: Job, *, show_progress: bool | None = None) -> DataFacts:
    """Tokenizes the text of a job into Megatron's ``.bin``/``.idx``, or finds it in the cache.

    A second start with the same text reads no text, and imports neither torch nor Megatron. Safe to be called
    by several jobs at once, and to be killed at any time.

    Args:
        job: Its ``data`` and ``tokenizer`` are used.
        show_progress: False for silence; otherwise a bar on a terminal and a line now and then elsewhere.

    Returns:
        The facts, with absolute paths into the cache.

    Raises:
        UserError: The text, the tokenizer, the split or the cache cannot be used.
    """
    listed_ns = time.time_ns()
    shares = parse_split(job.data.split)
    tokenizer = load_tokenizer(job.tokenizer)
    corpus = find_corpus(job.data)
    root = cache.cache_root(job.data.cache_dir)

    digests: list[bytes] | None = None
    content = cache.recall_content(root, corpus)
    if content is None:
        with progress(show_progress) as shown:
            digests = digest_documents(corpus, shown)
        content = content_hash(digests)
        cache.remember_content(root, corpus, content, listed_ns)
    fingerprint = _fingerprint(content, tokenizer, shares)

    entry, _ = cache.read_entry(root, fingerprint)
    if entry is None:
        with cache.building_lock(root, fingerprint):
            entry, fault = cache.read_entry(root, fingerprint)
            if entry is None:
                if fault:
                    cache.say(f"{root / fingerprint} is damaged: {fault}; it is built again")
                with progress(show_progress) as shown:
                    digests = digests if digests is not None else _digests_again(corpus, content, shown)
                    entry = _build(root, fingerprint, corpus, digests, tokenizer, shares, shown)
    return _facts(root, fingerprint, entry, corpus, tokenizer)


def too_small(facts: DataFacts, seq_length: int) -> list[Problem]:
    """The splits that hold not even one sample: ``seq_length`` tokens and the one after them.

    Args:
        facts: Of the data.
        seq_length: Tokens a sample.
    """
    return [
        Problem(
            "data.split",
            f"{split} has {number:,} tokens, and one sample needs seq_length + 1 = {seq_length + 1:,}",
            "give more text, a larger share in data.split, or a smaller model.seq_length",
        )
        for split, number in facts.num_tokens.items()
        if 0 < number < seq_length + 1
    ]


def _fingerprint(content: str, tokenizer: Tokenizer, shares: Shares) -> str:
    parts = [cache.FORMAT, content, tokenizer.fingerprint, [str(share) for share in shares]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _digests_again(corpus: Corpus, content: str, shown: Progress) -> list[bytes]:
    digests = digest_documents(corpus, shown)
    if content_hash(digests) != content:
        raise UserError(
            f"data.path: {corpus.root} changed while it was read", hint="start again when it is still"
        )
    return digests


def _build(
    root: Path,
    fingerprint: str,
    corpus: Corpus,
    digests: list[bytes],
    tokenizer: Tokenizer,
    shares: Shares,
    shown: Progress,
) -> dict[str, Any]:
    with cache.building_folder(root, fingerprint) as folder:
        entry = build_entry(folder, corpus, digests, tokenizer, shares, shown)
        cache.put_in_place(root, fingerprint, folder, entry)
    return entry


def _facts(
    root: Path, fingerprint: str, entry: dict[str, Any], corpus: Corpus, tokenizer: Tokenizer
) -> DataFacts:
    return DataFacts(
        fingerprint=fingerprint,
        prefixes={
            split: str(root / fingerprint / split) for split, number in entry["num_tokens"].items() if number
        },
        num_tokens=entry["num_tokens"],
        num_documents=entry["num_documents"],
        vocab_size=entry["vocab_size"],
        unigram_loss=entry["unigram_loss"],
        source=corpus.title,
        eod=entry["eod"],
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_arguments=tokenizer.megatron_arguments(root),
    )
