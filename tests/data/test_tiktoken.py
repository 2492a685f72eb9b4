"""Rank files give the ids of tiktoken itself, and Megatron sees the same vocabulary and end of a document."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from megatron_side import megatron_tokenizer
from small_tokenizers import small_ranks, write_megatron_tiktoken, write_tiktoken

from megaplug.data.tiktoken_patterns import PATTERNS
from megaplug.data.tokenizers import load_tokenizer
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

TEXTS = ["the ring and the others' 1234567", "größe \U0001f642\r\n\n\ttabs  and   spaces ", "語 \x00", "  "]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("ranks") / "small.tiktoken")


def config(path: Path, **more) -> TokenizerConfig:
    return TokenizerConfig(type="tiktoken", path=str(path), **more)


@pytest.mark.parametrize("pattern", [None, *PATTERNS, r"\w+|\W"])
def test_ids_are_those_of_the_library_and_give_the_text_back(pattern, file):
    import tiktoken

    plain = tiktoken.Encoding(
        name="plain",
        pat_str=PATTERNS.get(pattern or "o200k_base", pattern),
        mergeable_ranks=small_ranks(),
        special_tokens={"<|endoftext|>": 268},
    )
    ours = load_tokenizer(config(file, tiktoken_pattern=pattern))
    for text in TEXTS:
        assert ours.encode(text) == plain.encode(text)
        assert ours.decode([*ours.encode(text), ours.eod]) == text
    documents = ours.encode_documents([text.encode() for text in TEXTS])
    assert [ids.tolist() for ids in documents] == [[*plain.encode(text), 268] for text in TEXTS]
    assert (ours.vocab_size, ours.eod) == (269, 268)


def test_the_patterns_are_those_of_the_libraries(monkeypatch):
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as theirs
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})  # would be downloaded
    for name in ("r50k_base", "cl100k_base", "o200k_base"):
        assert PATTERNS[name] == getattr(openai_public, name)()["pat_str"]
    assert PATTERNS["v1"] == theirs._PATTERN_TIKTOKEN_V1
    assert PATTERNS["v2"] == theirs._PATTERN_TIKTOKEN_V2


def test_the_name_of_a_special_token_in_a_text_is_that_token(file):
    ours = load_tokenizer(config(file))
    assert ours.encode("a<|endoftext|>") == [ord("a"), ours.eod]
    (ids,) = ours.encode_documents([b"a<|endoftext|>"])
    assert ids.tolist() == [ord("a"), ours.eod]


def test_special_tokens_are_placed_or_follow_each_other(file, tmp_path):
    names = ["<|endoftext|>=300", "<a>", "x=y", "<b>=280"]
    ours = load_tokenizer(config(file, special_tokens=names, eod="<b>"))
    placed = {name: ours.encode(name) for name in ("<|endoftext|>", "<a>", "x=y", "<b>")}
    assert placed == {"<|endoftext|>": [300], "<a>": [301], "x=y": [302], "<b>": [280]}
    assert (ours.vocab_size, ours.eod) == (303, 280)
    theirs, _ = megatron_tokenizer(ours.megatron_arguments(tmp_path))
    assert (theirs.vocab_size, theirs.eod, theirs.pad) == (303, 280, -1)


@pytest.mark.parametrize("pattern", [None, "v1", "v2"])
def test_megatrons_own_form_is_what_megatron_reads(pattern, tmp_path):
    file = write_megatron_tiktoken(tmp_path / "vocab.json")
    ours = load_tokenizer(config(file, tiktoken_pattern=pattern, tiktoken_num_special_tokens=20))
    theirs, args = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
    assert args.tokenizer_type == "TikTokenizer"
    assert (theirs.vocab_size, theirs.eod) == (ours.vocab_size, ours.eod) == (288, 2)
    for text in [*TEXTS, "an </s> and a <SPECIAL_7> inside"]:
        assert theirs.tokenize(text) == ours.encode(text)


def test_megatrons_form_with_an_end_or_a_pattern_that_it_cannot_have(tmp_path):
    file = write_megatron_tiktoken(tmp_path / "vocab.json")
    for more in ({"eod": "<sep>"}, {"tiktoken_pattern": "llama3"}):
        ours = load_tokenizer(config(file, **more))
        theirs, args = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
        assert args.tokenizer_type == "NullTokenizer"
        assert (
            (theirs.vocab_size, theirs.eod)
            == (ours.vocab_size, ours.eod)
            == (1268, 6 if "eod" in more else 2)
        )


def test_the_fingerprint_follows_all_that_decides_ids(file, tmp_path):
    copy = write_tiktoken(tmp_path / "copy.tiktoken")
    same = load_tokenizer(config(file)).fingerprint
    assert load_tokenizer(config(copy, tiktoken_pattern="o200k_base")).fingerprint == same
    others = [
        config(copy, tiktoken_pattern="v1"),
        config(copy, special_tokens=["<|endoftext|>=500"]),
        config(copy, special_tokens=["<|endoftext|>", "<e>"], eod="<e>"),
        config(write_tiktoken(tmp_path / "less", {bytes([i]): i for i in range(256)})),
    ]
    assert len({same, *(load_tokenizer(other).fingerprint for other in others)}) == 5


def test_a_missing_package_is_one_line_with_the_cure(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="needs the package tiktoken") as error:
        load_tokenizer(config(file))
    assert "pip install tiktoken" in error.value.hint


BYTES = {bytes([i]): i for i in range(256)}


@pytest.mark.parametrize(
    ("ranks", "more", "says"),
    [
        (BYTES, {"tiktoken_pattern": "("}, "tiktoken_pattern: '\\(' is not a regular expression"),
        (BYTES, {"tiktoken_pattern": "o200k"}, "text such as 'a' .* would be lost"),
        (BYTES, {"tiktoken_pattern": r"\w+|\s+"}, r"text such as '\.' .* would be lost"),
        (BYTES, {"eod": "</s>"}, "'</s>' is not among the special tokens"),
        (BYTES, {"special_tokens": ["<a>", "<a>"]}, "'<a>' is given twice"),
        (BYTES, {"special_tokens": ["<a>=7"]}, "the id 7 of '<a>' is taken"),
        ({**BYTES, b"ab": 5}, {}, "gives 1 ranks a second time"),
        ({b"a": 0}, {}, "lacks 255 of the 256 bytes"),
    ],
)
def test_what_makes_no_tokenizer_is_refused(ranks, more, says, tmp_path):
    file = write_tiktoken(tmp_path / "x.tiktoken", ranks)
    with pytest.raises(UserError, match=says):
        load_tokenizer(config(file, **more))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "lacks 256 of the 256 bytes"),
        ("YQ== 0\nYg==\n", ":2 is not base64 and a number"),
        ("YQ== 0\nYQ== 1\n", ":2 has b'a' a second time"),
        ('[{"rank": 0, "token_bytes": "YQ==", "token_str": "a"}]', "does not count its ranks from 0"),
        ('[{"rank": 0, "token_bytes": 5}]', "is not a list of ranks with token_bytes"),
    ],
)
def test_a_file_that_is_no_rank_file_is_refused(content, says, tmp_path):
    file = tmp_path / "x.tiktoken"
    file.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        load_tokenizer(config(file))
    assert "tokenizer.path" in str(error.value)


def test_megatrons_form_needs_megatrons_names(tmp_path):
    file = write_megatron_tiktoken(tmp_path / "vocab.json")
    with pytest.raises(UserError, match="needs <unk>, <s>, <mask>"):
        load_tokenizer(config(file, special_tokens=["</s>"]))
    with pytest.raises(UserError, match="tiktoken_num_special_tokens=3 places"):
        load_tokenizer(config(file, tiktoken_num_special_tokens=3))
