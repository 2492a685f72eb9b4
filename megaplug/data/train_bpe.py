"""Trains a byte-level BPE on a corpus and writes the folder that ``tokenizer=huggingface`` takes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from megaplug.data.delivery import delivery_errors, refuse_existing
from megaplug.data.documents import read_documents
from megaplug.data.faults import Faults
from megaplug.data.progress import Progress
from megaplug.data.sources import Corpus
from megaplug.errors import UserError
from megaplug.runs.atomic import fsync_folder

EOD = "<|endoftext|>"
SMALLEST = 257
"""All bytes, and the end of a document."""

# What a folder may hold to be taken for a tokenizer and nothing else.
_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
_BATCH_BYTES = 1_000_000
_SAMPLE_BYTES = 2_000_000
_TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class Trained:
    """A tokenizer that was trained.

    Attributes:
        folder: Where it is.
        vocab_size: Its tokens; fewer than were asked for where the text has no more to merge.
        eod: The token that ends a document.
        num_documents: Of the text.
        num_bytes: Of the text in UTF-8.
        bytes_per_token: In the first part of that text.
        seconds: That it took.
    """

    folder: str
    vocab_size: int
    eod: str
    num_documents: int
    num_bytes: int
    bytes_per_token: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def train_tokenizer(
    corpora: list[Corpus],
    vocab_size: int,
    folder: Path,
    shown: Progress,
    faults: Faults,
    *,
    overwrite: bool = False,
    refuse_faults: bool = False,
) -> Trained:
    """Trains on all text of some corpora.

    Text is cut as GPT-2 cuts it (words with the space before them, numbers, punctuation) and merged from
    bytes, so that every text can be encoded and comes back unchanged.

    Args:
        corpora: Where the text is.
        vocab_size: Tokens, bytes and the end of a document included.
        folder: Is made; it is there whole or not at all.
        shown: Is told how far it is.
        faults: Is told of what is no document.
        overwrite: Whether a folder that is there may be replaced.
        refuse_faults: Whether what is no document ends it, instead of being left out.

    Raises:
        UserError: The folder is there, the vocabulary is too small, there is no text, or the disk refused.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"vocab_size: {vocab_size} is below {SMALLEST}: the 256 bytes and the end of a document",
            hint="8192 or 32768 are usual",
        )
    _refuse_taken(folder, overwrite)
    for corpus in corpora:
        if corpus.prefixes:
            raise UserError(
                f"data.path: {corpus.prefixes[0].path} holds ids, and a tokenizer is trained on text",
                hint="give the text from which it was made",
            )
    begun = time.monotonic()
    feed = _Feed(corpora, shown, faults)
    content = _in_background(lambda: _train(feed, vocab_size), shown)
    if refuse_faults:
        faults.refuse()
    if not feed.num_documents:
        raise UserError(f"data.path: there is no text in {corpora[0].root}", hint="every file of it is empty")
    _write(folder, content)
    return Trained(
        folder=str(folder),
        vocab_size=len(json.loads(content)["model"]["vocab"]),
        eod=EOD,
        num_documents=feed.num_documents,
        num_bytes=feed.num_bytes,
        bytes_per_token=_bytes_per_token(content, feed.sample),
        seconds=time.monotonic() - begun,
    )


class _Feed:
    """Texts in handfuls, counted as they go by."""

    def __init__(self, corpora: list[Corpus], shown: Progress, faults: Faults) -> None:
        self._corpora, self._shown, self._faults = corpora, shown, faults
        self.num_documents = self.num_bytes = 0
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for corpus in self._corpora:
            self._shown.stage(f"reading {corpus.title}", corpus.size)
            for document in read_documents(corpus, self._faults):
                self._shown.advance(document.num_read)
                if not document.text:
                    continue
                text = document.text.decode()
                if self.num_bytes < _SAMPLE_BYTES:
                    self.sample.append(text)
                self.num_documents += 1
                self.num_bytes += len(document.text)
                batch.append(text)
                size += len(document.text)
                if size >= _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch
        self._shown.stage("merging", 0)


def _train(feed: _Feed, vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(feed), trainer)
    content: str = tokenizer.to_str(pretty=True)
    return content


def _in_background[T](work: Callable[[], T], shown: Progress) -> T:
    """Works in a daemon thread, so that Ctrl-C ends the wait; the library hears of it at its end only."""
    pool = ThreadPool(1)
    waited = pool.apply_async(work)
    pool.close()  # or it would complain when it is left at its work
    while True:
        try:
            done: T = waited.get(timeout=_TELL_EVERY_S)
        except TimeoutError:
            shown.advance(0)  # says that it is still at it
        else:
            return done


def _bytes_per_token(content: str, sample: list[str]) -> float:
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_str(content).encode_batch_fast(sample)
    return sum(len(text.encode()) for text in sample) / sum(len(one.ids) for one in encoded)


def _refuse_taken(folder: Path, overwrite: bool) -> None:
    """Only a folder that holds a tokenizer and nothing else may be replaced, and only when told to."""
    if not folder.exists():
        return
    if not overwrite:
        refuse_existing([folder])
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else {folder.name}
    if others := sorted(names - _FILES):
        raise UserError(
            f"out: {folder} is not only a tokenizer: it holds {', '.join(others[:3])}",
            hint="choose another place with out=, or remove it yourself",
        )


def _write(folder: Path, content: str) -> None:
    """Makes the folder beside its place and renames it."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    with delivery_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, text in files.items():
                with (building / name).open("w", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
            os.umask(mask := os.umask(0o022))
            building.chmod(0o777 & ~mask)  # mkdtemp makes it private
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
                folder.rename(old / "old")
                building.rename(folder)
                shutil.rmtree(old)
            else:
                building.rename(folder)
            fsync_folder(folder.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
