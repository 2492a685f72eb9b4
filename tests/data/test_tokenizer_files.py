"""A file of the wrong kind is called what it is, with the option that takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tokenizers import small_texts, write_megatron_tiktoken, write_sentencepiece, write_tiktoken

from megaplug.data.tokenizer_files import kind_of
from megaplug.data.tokenizers import load_tokenizer
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

KINDS = ("huggingface", "sentencepiece", "tiktoken")


@pytest.fixture(scope="module")
def files(tmp_path_factory, bpe_file) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "huggingface": [bpe_file],
        "sentencepiece": [write_sentencepiece(folder / "s.bin", small_texts())],
        "tiktoken": [write_tiktoken(folder / "ranks"), write_megatron_tiktoken(folder / "m.json")],
    }


def test_each_kind_is_told_by_its_content(files):
    for kind, its in files.items():
        assert [kind_of(file.read_bytes()[:4096]) for file in its] == [kind] * len(its)
    for content in (b"", b"hello world\n", b"\x00\x01", b'["a"]', b"PK\x03\x04"):
        assert kind_of(content) is None
    assert kind_of(json.dumps({"version": "1.0"}).encode()) == "huggingface"


@pytest.mark.parametrize("asked", KINDS)
@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_file_of_another_kind_is_named_with_its_option(asked, given, form, files, tmp_path):
    if asked == given:
        return
    names = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model", "tiktoken": "x.tiktoken"}
    for file in files[given]:
        copy = tmp_path / names[given]
        copy.write_bytes(file.read_bytes())
        path = copy if form == "file" else tmp_path
        with pytest.raises(UserError) as error:
            load_tokenizer(TokenizerConfig(type=asked, path=str(path)))
        assert f"use tokenizer={given}" in error.value.hint


def test_llama_3_calls_its_ranks_a_model(files, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(files["tiktoken"][0].read_bytes())
    with pytest.raises(UserError, match="is a rank file of tiktoken, not a SentencePiece model"):
        load_tokenizer(TokenizerConfig(type="sentencepiece", path=str(tmp_path)))
    assert load_tokenizer(TokenizerConfig(type="tiktoken", path=str(tmp_path))).vocab_size == 269


def test_bytes_take_no_file_and_say_who_does(files):
    for kind, (file, *_) in files.items():
        with pytest.raises(UserError, match="has no file") as error:
            load_tokenizer(TokenizerConfig(path=str(file)))
        assert f"add tokenizer={kind}," in error.value.hint


def test_several_that_may_be_meant_are_listed(files, tmp_path):
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(files["sentencepiece"][0].read_bytes())
    with pytest.raises(UserError, match=r"several files that may be it: a.model, b.model"):
        load_tokenizer(TokenizerConfig(type="sentencepiece", path=str(tmp_path)))
