from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from megatron_side import megatron_tokenizer

from megaplug.data.prepare import prepare
from megaplug.data.tokenizers import (
    ByteTokenizer,
    load_tokenizer,
    megatron_tokenizer_arguments,
    tokenizer_fingerprint,
)
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

TEXTS = ["the ring of ranks turns", "größe \U0001f642\r\n\ttabs", "an </s> inside", " "]


def huggingface(path: Path) -> TokenizerConfig:
    return TokenizerConfig(type="huggingface", path=str(path))


def test_bytes_are_their_own_ids_and_the_end_is_none_of_them():
    tokenizer = load_tokenizer(TokenizerConfig())
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eod]) == text
    every_byte = bytes(range(256))
    (ids,) = tokenizer.encode_documents([every_byte])
    assert ids.tolist() == [*range(256), tokenizer.eod]
    assert tokenizer.eod == 256 and tokenizer.vocab_size == 257


def test_a_bpe_file_gives_ids_of_whole_documents_that_decode_to_the_text(bpe_file):
    tokenizer = load_tokenizer(huggingface(bpe_file))
    long_text = "the ring of ranks turns " * 20  # the file asks to cut after 8 ids
    (ids,) = tokenizer.encode_documents([long_text.encode()])
    assert tokenizer.decode(ids.tolist()) == long_text
    assert len(ids) > 40
    assert ids[-1] == tokenizer.eod == 1
    assert ids[0] == 0  # the template's beginning
    assert ids[:-1].tolist() == tokenizer.encode(long_text)


def test_an_end_that_the_template_puts_is_not_doubled(bpe_file, tmp_path):
    values = json.loads(bpe_file.read_text())
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (ids,) = load_tokenizer(huggingface(tmp_path)).encode_documents([b"ring"])
    assert ids.tolist().count(1) == 1


def test_megatron_builds_a_byte_tokenizer_of_the_same_size_and_end():
    theirs, args = megatron_tokenizer(megatron_tokenizer_arguments(TokenizerConfig()))
    assert (theirs.vocab_size, theirs.eod, theirs.pad) == (ByteTokenizer.vocab_size, ByteTokenizer.eod, -1)
    assert args.padded_vocab_size == 384


@pytest.mark.parametrize("form", ["file", "folder", "folder of a model's own class"])
def test_megatron_builds_the_same_bpe(form, bpe_file, tmp_path):
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": "<not there>"}
    if form == "file":
        path = bpe_file
    else:
        path = tmp_path / "model"
        path.mkdir()
        shutil.copy(bpe_file, path)
        if "own class" in form:
            # by this name alone, transformers adds a token of that model's to the vocabulary
            config |= {"tokenizer_class": "GPT2Tokenizer"}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(huggingface(path))
    theirs, _ = megatron_tokenizer(megatron_tokenizer_arguments(huggingface(path), tmp_path / "cache"))
    assert (theirs.vocab_size, theirs.eod) == (ours.vocab_size, ours.eod) == (320, 1)
    for text in [*TEXTS, "the ring of ranks turns " * 20]:
        assert theirs.tokenize(text) == ours.encode(text)
    laid_out = sorted(p.name for p in (tmp_path / "cache" / "tokenizers" / ours.fingerprint).iterdir())
    assert laid_out == ["tokenizer.json", "tokenizer_config.json"]


def test_the_fingerprint_follows_the_content_not_the_place(bpe_file, tmp_path):
    shutil.copy(bpe_file, tmp_path)
    same = tokenizer_fingerprint(huggingface(tmp_path))
    assert same == tokenizer_fingerprint(huggingface(bpe_file))
    assert same != tokenizer_fingerprint(TokenizerConfig())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert tokenizer_fingerprint(huggingface(tmp_path)) != same


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no tokenizer.json is in"),
        ({"tokenizer.model": ""}, "another form"),
        ({"vocab.json": "{}", "merges.txt": ""}, "another form"),
        ({"tokenizer.json": "{"}, "is not JSON"),
        ({"tokenizer.json": "[]"}, "holds no object"),
        ({"tokenizer.json": "{}"}, "nothing says which token ends a text"),
        ({"tokenizer.json": '{"added_tokens": [{"content": "</s>"}]}'}, "is not a tokenizer"),
        (
            {"tokenizer.json": '{"added_tokens": [{"content": "</s>"}, {"content": "<eos>"}]}'},
            "which of </s>, <eos> ends a text",
        ),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(files, says, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(huggingface(tmp_path))
    assert says in str(error.value) and "tokenizer.path" in str(error.value)


def test_an_end_that_is_not_in_the_vocabulary_is_refused(bpe_file, tmp_path):
    shutil.copy(bpe_file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(UserError, match=r"'<end>'.*not in its vocabulary of 320"):
        load_tokenizer(huggingface(tmp_path))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (TokenizerConfig(type="bpe"), "'bpe' is not known"),
        (TokenizerConfig(type="huggingface"), "is not given"),
        (TokenizerConfig(path="x.json"), "has no file"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config, says):
    with pytest.raises(UserError, match=says):
        load_tokenizer(config)


@pytest.mark.parametrize("kind", ["byte", "huggingface"])
def test_megatron_draws_samples_from_each_split(kind, corpus_folder, bpe_file, make_job, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    job = make_job(corpus_folder, split="70,30,0")
    if kind == "huggingface":
        job.tokenizer = huggingface(bpe_file)
    facts = prepare(job)
    tokenizer, _ = megatron_tokenizer(facts.tokenizer_arguments)
    assert (tokenizer.vocab_size, tokenizer.eod) == (facts.vocab_size, facts.eod)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend_per_split=[
            ([facts.prefixes[split]], None) if split in facts.prefixes else None
            for split in ("train", "valid", "test")
        ],
        path_to_cache=str(tmp_path / "index"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, [40, 8, 0], lambda: True, config).build()
    assert test is None
    assert len(train) >= 40 and len(valid) >= 8
    text = IndexedDataset(facts.prefixes["train"])
    there = {int(i) for n in range(len(text)) for i in text[n]}
    for sample in (train[0], train[39]):
        assert sample["tokens"].shape == (16,)
        assert set(sample["tokens"].tolist()) | set(sample["labels"].tolist()) <= there
        assert bool(sample["loss_mask"].all())  # nothing is taken for padding
