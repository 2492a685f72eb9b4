"""``prepare(job)``: the data of a job as Megatron reads it, built once and found again by its content."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaplug.data import blend, cache
from megaplug.data.blend import Given
from megaplug.data.build import build_entry, changed, content_hash, digest_documents
from megaplug.data.crew import Crew, crew, num_cores
from megaplug.data.faults import Faults
from megaplug.data.prefixes import build_views, check_ids, listing_key, scan_prefix
from megaplug.data.progress import Progress, progress
from megaplug.data.shards import SHARD_BYTES
from megaplug.data.sources import Corpus, Prefix, find_corpus, listing, newest_ns
from megaplug.data.split import Shares, parse_split, without
from megaplug.data.tokenizers import Tokenizer, load_tokenizer
from megaplug.errors import Problem, UserError
from megaplug.job.facts import DataFacts
from megaplug.job.schema import Job
from megaplug.job.sources import SourceSpec, sources

if TYPE_CHECKING:
    import numpy as np

_WHOLE = parse_split("1")


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
    shares = parse_split(job.data.split)
    preparation = _Preparation(job, show_progress)
    valid, test = sources(job.data, "valid_path"), sources(job.data, "test_path")
    own = [split for split, specs in (("valid", valid), ("test", test)) if specs]
    given = [
        *(preparation.source(spec, without(shares, own), {}) for spec in sources(job.data)),
        *(preparation.source(spec, _WHOLE, {"train": "valid"}) for spec in valid),
        *(preparation.source(spec, _WHOLE, {"train": "test"}) for spec in test),
    ]
    return blend.facts(given, preparation.tokenizer, preparation.root)


def too_small(facts: DataFacts, seq_length: int) -> list[Problem]:
    """The splits that hold not even one sample: ``seq_length`` tokens and the one after them.

    Args:
        facts: Of the data.
        seq_length: Tokens a sample.
    """
    return [
        Problem(
            "data.split",
            f"{split}{f' of {part.name}' if split in facts.blends else ''} has {part.num_tokens:,} tokens, "
            f"and one sample needs seq_length + 1 = {seq_length + 1:,}",
            "give more text, a larger share in data.split, or a smaller model.seq_length",
        )
        for split in facts.num_tokens
        for part in facts.parts(split)
        if part.num_tokens < seq_length + 1
    ]


class _Preparation:
    """What all sources of a job share."""

    def __init__(self, job: Job, show_progress: bool | None) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(job.tokenizer)
        self.root = cache.cache_root(job.data.cache_dir)
        self._job = job
        self._show = show_progress

    def source(self, spec: SourceSpec, shares: Shares, becomes: dict[str, str]) -> Given:
        """Prepares one source.

        Args:
            spec: The source.
            shares: Of its train, valid and test.
            becomes: Which split of the job each of these is, where it is another.
        """
        listed_ns = time.time_ns()
        corpus = find_corpus(spec.path, spec.text_key, self.root)
        if corpus.left_out:
            cache.say(f"left out of {corpus.root}: {corpus.left_out}")
        entries, num_bad = [], 0
        if corpus.files:
            entry, num_bad = self._text(corpus, shares, listed_ns)
            entries.append(entry)
        entries += [self._prefix(prefix, shares, listed_ns) for prefix in corpus.prefixes]
        return Given(spec.name, corpus.title, spec.weight, entries, becomes, num_bad)

    def _text(self, corpus: Corpus, shares: Shares, listed_ns: int) -> tuple[blend.Entry, int]:
        digests: np.ndarray | None = None
        name, listed = f"{corpus.root}\0{corpus.text_key}", corpus.listing()
        with ExitStack() as opened:
            working = functools.cache(lambda: opened.enter_context(self._working(corpus.size)))
            known = cache.recall(self.root, name, listed)
            if known is None:
                digests, faults = digest_documents(corpus, *working())
                known = {"content": content_hash(digests), "faults": faults.to_dict(), "num": len(digests)}
                cache.remember(self.root, name, listed, known, listed_ns - corpus.newest_ns)
            faults = Faults.from_dict(known["faults"])
            self._judge(corpus, faults, known["num"])
            fingerprint = _fingerprint(known["content"], self.tokenizer, shares)

            def build(folder: Path) -> dict[str, Any]:
                found = digests
                if found is None:
                    found, _ = digest_documents(corpus, *working())
                    if content_hash(found) != known["content"]:
                        cache.forget(self.root, name)  # or it would be believed at every start
                        raise changed(corpus)
                return build_entry(folder, corpus, found, self.tokenizer, shares, *working())

            entry = self._entry(fingerprint, build)
        return blend.Entry(fingerprint, self.root / fingerprint, entry), faults.bad

    def _judge(self, corpus: Corpus, faults: Faults, num_documents: int) -> None:
        """Refuses, or says, what cannot be used."""
        if self._job.data.bad_lines == "refuse":
            faults.refuse()
        if faults.bad:
            cache.say(f"{corpus.title}: {faults.summary('cannot be used and left out')}\n{faults.listed()}")
        if not num_documents:
            raise UserError(
                f"data.path: there is no text in {corpus.root}", hint="every file or line of it is empty"
            )

    def _prefix(self, prefix: Prefix, shares: Shares, listed_ns: int) -> blend.Entry:
        files = (prefix.bin, prefix.idx)
        name, listed = f"{prefix.path}\0{self.tokenizer.eod}", listing(files)
        known = cache.recall(self.root, name, listed)
        if known is None:
            with self._working(prefix.bin.size) as (workers, shown):
                known = scan_prefix(prefix, self.tokenizer.eod, workers, shown)
            cache.remember(self.root, name, listed, known, listed_ns - newest_ns(files))
        check_ids(prefix, known, self.tokenizer)

        def build(folder: Path) -> dict[str, Any]:
            with progress(self._show) as shown:
                return build_views(folder, prefix, self.tokenizer, shares, shown)

        key = listing_key(prefix, listed, shares, self.tokenizer)
        entry = self._entry(key, build)
        fingerprint = _fingerprint(f"tokenized {known['content']}", self.tokenizer, shares)
        return blend.Entry(fingerprint, self.root / key, entry)

    def _entry(self, key: str, build: Any) -> dict[str, Any]:
        """The entry of the cache with this name; it is built if it is not there, or is damaged."""
        entry, _ = cache.read_entry(self.root, key)
        if entry is not None:
            return entry
        with cache.building_lock(self.root, key) as is_locked:
            entry, fault = cache.read_entry(self.root, key)
            if entry is None:
                if fault:
                    cache.say(f"{self.root / key} is damaged: {fault}; it is built again")
                with cache.building_folder(self.root, key, is_locked=is_locked) as folder:
                    entry = build(folder)
                    cache.put_in_place(self.root, key, folder, entry)
        return entry

    @contextmanager
    def _working(self, size: int) -> Iterator[tuple[Crew, Progress]]:
        """Those who do the work on so many bytes, and who is told how far it is."""
        workers = min(num_cores(), size // SHARD_BYTES)
        with crew(workers, self._job.tokenizer) as busy, progress(self._show) as shown:
            yield busy, shown


def _fingerprint(content: str, tokenizer: Tokenizer, shares: Shares) -> str:
    parts = [cache.FORMAT, content, tokenizer.fingerprint, [str(share) for share in shares]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
