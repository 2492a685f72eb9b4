"""A SentencePiece model gives the ids of its own library, and Megatron sees the same vocabulary and end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from megatron_side import megatron_tokenizer
from small_tokenizers import small_texts, write_sentencepiece

from megaplug.data.tokenizers import load_tokenizer
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

TEXTS = [
    "the ring of ranks turns",
    "größe \U0001f642\r\n\ttabs  and   spaces ",
    "an </s> inside",
    " ",
    "\x00",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("spm") / "tokenizer.model", small_texts())


def config(path: Path, **more: str) -> TokenizerConfig:
    return TokenizerConfig(type="sentencepiece", path=str(path), **more)


def test_ids_are_those_of_the_library_and_give_the_text_back(model):
    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ours = load_tokenizer(config(model))
    for text in TEXTS:
        assert ours.encode(text) == plain.encode(text)
        assert ours.decode([*ours.encode(text), ours.eod]) == text
    documents = ours.encode_documents([text.encode() for text in TEXTS])
    assert [ids.tolist() for ids in documents] == [[*plain.encode(text), plain.eos_id()] for text in TEXTS]
    assert (ours.vocab_size, ours.eod) == (plain.vocab_size(), plain.eos_id()) == (300, 2)


def test_megatron_builds_the_same_from_a_copy(model, tmp_path):
    ours = load_tokenizer(config(model.parent))
    arguments = ours.megatron_arguments(tmp_path / "cache")
    assert str(tmp_path / "cache" / "tokenizers" / ours.fingerprint) in arguments[-1]
    theirs, args = megatron_tokenizer(arguments)
    assert args.tokenizer_type == "SentencePieceTokenizer"
    assert (theirs.vocab_size, theirs.eod) == (ours.vocab_size, ours.eod)
    for text in TEXTS:
        assert theirs.tokenize(text) == ours.encode(text)


def test_another_piece_may_end_a_document_and_megatron_is_told(tmp_path):
    model = write_sentencepiece(
        tmp_path / "m.model", small_texts(), user_defined_symbols=["<doc>"], eos_id=-1
    )
    with pytest.raises(UserError, match="without a piece for the end of a sentence"):
        load_tokenizer(config(model))
    ours = load_tokenizer(config(model, eod="<doc>"))
    assert ours.encode("<doc>") == [ours.eod]
    theirs, _ = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
    assert (theirs.vocab_size, theirs.eod, theirs.pad) == (ours.vocab_size, ours.eod, -1)
    with pytest.raises(UserError, match="'<no>' is not a piece"):
        load_tokenizer(config(model, eod="<no>"))


def test_the_fingerprint_follows_the_content_and_the_end(model, tmp_path):
    copy = tmp_path / "other.model"
    copy.write_bytes(model.read_bytes())
    same = load_tokenizer(config(model)).fingerprint
    assert load_tokenizer(config(copy)).fingerprint == same
    assert load_tokenizer(config(copy, eod="<s>")).fingerprint != same
    write_sentencepiece(copy, small_texts(20))
    assert load_tokenizer(config(copy)).fingerprint != same


def test_a_missing_package_is_one_line_with_the_cure(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="needs the package sentencepiece") as error:
        load_tokenizer(config(model))
    assert "pip install sentencepiece" in error.value.hint


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a SentencePiece model"),
        (b"\n\x05\nabc", "is not a SentencePiece model"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_model_is_refused(content, says, tmp_path):
    file = tmp_path / "x.model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        load_tokenizer(config(file))
    assert "tokenizer.path" in str(error.value)
