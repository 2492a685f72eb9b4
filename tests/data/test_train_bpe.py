"""A tokenizer trained here loads in transformers, gives every text back, and is written whole or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaplug.data import train_bpe
from megaplug.data.documents import read_documents
from megaplug.data.faults import Faults
from megaplug.data.progress import Silence
from megaplug.data.sources import find_corpus
from megaplug.data.tokenizers import load_tokenizer
from megaplug.data.train_bpe import train_tokenizer
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig


def train(corpus: Path, folder: Path, size: int = 300, **more):
    return train_tokenizer([find_corpus(str(corpus))], size, folder, Silence(), Faults(), **more)


def texts_of(corpus: Path) -> list[bytes]:
    documents = read_documents(find_corpus(str(corpus)), Faults())
    return [document.text for document in documents if document.text]


def test_what_was_trained_loads_here_and_in_transformers(corpus_folder, tmp_path):
    from transformers import AutoTokenizer

    trained = train(corpus_folder, tmp_path / "mine")
    ours = load_tokenizer(TokenizerConfig(type="huggingface", path=str(tmp_path / "mine")))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert trained.vocab_size == ours.vocab_size == len(theirs) == 300
    assert ours.eod == theirs.eos_token_id == theirs.convert_tokens_to_ids("<|endoftext|>")
    texts = [text.decode() for text in texts_of(corpus_folder)]
    for text in (texts[3], "nothing like it: größe \U0001f642\r\n\t\x00  x", ""):
        assert ours.decode(ours.encode(text)) == text
        assert ours.encode(text) == theirs(text).input_ids
    assert trained.num_documents == 20
    assert trained.num_bytes == sum(len(text.encode()) for text in texts)
    encoded = sum(len(ours.encode(text)) for text in texts)
    assert trained.bytes_per_token == pytest.approx(trained.num_bytes / encoded)
    assert trained.bytes_per_token > 2


def test_the_same_text_gives_the_same_tokenizer(corpus_folder, tmp_path):
    for name in ("one", "two"):
        train(corpus_folder, tmp_path / name)
    files = ("tokenizer.json", "tokenizer_config.json")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_a_small_text_gives_fewer_tokens_than_asked_and_says_so(corpus_folder, tmp_path):
    assert 257 < train(corpus_folder, tmp_path / "mine", 50_000).vocab_size < 2_000


def test_a_folder_is_replaced_only_when_told_and_only_if_it_is_a_tokenizer(corpus_folder, tmp_path):
    train(corpus_folder, tmp_path / "mine")
    with pytest.raises(UserError, match="mine is there already"):
        train(corpus_folder, tmp_path / "mine", 280)
    train(corpus_folder, tmp_path / "mine", 280, overwrite=True)
    assert len(json.loads((tmp_path / "mine" / "tokenizer.json").read_text())["model"]["vocab"]) == 280
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not only a tokenizer: it holds thesis\.txt"):
        train(corpus_folder, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_left_of_a_training_that_failed(corpus_folder, tmp_path, monkeypatch):
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_bpe.os, "fsync", full)
    with pytest.raises(UserError, match=r"out: .*mine cannot be written: No space left"):
        train(corpus_folder, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_what_cannot_be_trained_on_is_refused(corpus_folder, tmp_path):
    with pytest.raises(UserError, match="vocab_size: 256 is below 257"):
        train(corpus_folder, tmp_path / "mine", 256)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in"):
        train(tmp_path / "empty.txt", tmp_path / "mine")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txet": "bad"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        train(tmp_path / "bad.jsonl", tmp_path / "mine", refuse_faults=True)
    assert not (tmp_path / "mine").exists()
    assert train(tmp_path / "bad.jsonl", tmp_path / "mine").num_documents == 1
