"""What stands beside a tokenizer.json counts as it does for transformers, and Megatron sees the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from megatron_side import megatron_tokenizer

from megaplug.data.tokenizers import load_tokenizer
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [
    "the ring of ranks turns",
    "a<|im_start|>b <|im_end|> and a<code>b",
    "an </s> inside <s>",
    "größe \U0001f642\n",
]
IM = {
    "320": {"content": "<|im_start|>", "special": True, "normalized": False},
    "321": {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": True},
    "322": {"content": "<code>", "special": False, "normalized": True},
}


@pytest.fixture
def make_folder(bpe_file, tmp_path):
    def make(config: dict[str, Any], **files: str) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(bpe_file, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)
        return folder

    return make


def load(folder: Path, **more: str):
    return load_tokenizer(TokenizerConfig(type="huggingface", path=str(folder), **more))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({}, 320),
        ({"added_tokens_decoder": IM}, 323),
        ({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, 322),
        ({"extra_special_tokens": {"image_token": "<|im_end|>"}}, 321),
        ({"add_bos_token": False, "add_eos_token": True}, 320),
    ],
)
def test_ids_are_those_of_transformers_and_of_megatron(config, size, make_folder, tmp_path):
    from transformers import AutoTokenizer

    folder = make_folder(PLAIN | config)
    reference = AutoTokenizer.from_pretrained(folder)
    ours = load(folder)
    theirs, _ = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod) == (len(reference), 1) == (size, 1)
    for text in TEXTS:
        wanted = reference(text, truncation=False).input_ids
        assert wanted[0] == 0  # as the template says
        assert ours.encode(text) == theirs.tokenize(text) == wanted
        assert ours.decode(wanted) == reference.decode(wanted, skip_special_tokens=True)


def test_the_text_comes_back(make_folder):
    ours = load(make_folder(PLAIN | {"added_tokens_decoder": IM}))
    for text in (TEXTS[0], TEXTS[3], " a<code>b \r\n\t  "):
        assert ours.decode(ours.encode(text)) == text


def test_an_end_that_is_typed_wins_over_that_of_the_folder(make_folder, tmp_path):
    folder = make_folder(PLAIN | {"added_tokens_decoder": IM, "eos_token": "<|im_end|>"})
    assert load(folder).eod == 321
    ours = load(folder, eod="</s>")
    theirs, _ = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
    assert ours.eod == theirs.eod == 1
    with pytest.raises(UserError, match=r"tokenizer.eod: .*'<end>'.*not in its vocabulary"):
        load(folder, eod="<end>")


def test_a_lone_file_needs_no_more_than_a_typed_end(bpe_file, tmp_path):
    values = json.loads(bpe_file.read_text())
    text = json.dumps(values).replace("</s>", "<stop>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="nothing says which token ends a text") as error:
        load(tmp_path)
    assert "tokenizer.eod=" in error.value.hint
    assert load(tmp_path, eod="<stop>").eod == 1


@pytest.mark.parametrize("where", ["config", "file"])
def test_the_chat_template_goes_to_megatron_and_changes_no_ids(where, make_folder, tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    if where == "config":
        folder = make_folder(PLAIN | {"chat_template": template})
    else:
        folder = make_folder(PLAIN, chat_template__jinja=template)
    ours = load(folder)
    theirs, _ = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
    assert theirs.chat_template == template
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    other = load(folder)
    assert other.fingerprint == ours.fingerprint
    theirs, _ = megatron_tokenizer(other.megatron_arguments(tmp_path / "cache"))
    assert theirs.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("pads_with", ["</s>", "<s>"])
def test_a_token_that_also_pads_stays_in_the_text(pads_with, make_folder, tmp_path):
    """Megatron masks the padding token and puts id 0 in its place wherever it stands."""
    ours = load(make_folder(PLAIN | {"pad_token": pads_with}))
    theirs, _ = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
    assert theirs.pad is None


def test_padding_of_its_own_is_kept(make_folder, tmp_path):
    ours = load(make_folder(PLAIN | {"added_tokens_decoder": IM, "pad_token": "<|im_start|>"}))
    theirs, _ = megatron_tokenizer(ours.megatron_arguments(tmp_path / "cache"))
    assert theirs.pad == 320


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"added_tokens_decoder": {"400": {"content": "<x>"}}}, "'<x>' has the id 400, but .* it is 320"),
        ({"added_tokens_decoder": {"first": {"content": "<x>"}}}, "added_tokens_decoder .* is not an object"),
        ({"added_tokens_decoder": ["<x>"]}, "added_tokens_decoder .* is not an object"),
    ],
)
def test_files_that_contradict_each_other_are_refused(config, says, make_folder):
    with pytest.raises(UserError, match=says):
        load(make_folder(PLAIN | config))


def test_the_fingerprint_follows_what_stands_beside_it(make_folder):
    folder = make_folder(PLAIN)
    seen = {load(folder).fingerprint}
    for more in ({"added_tokens_decoder": IM}, {"eos_token": "<s>"}, {"extra_special_tokens": ["<x>"]}):
        (folder / "tokenizer_config.json").write_text(json.dumps(PLAIN | more))
        seen.add(load(folder).fingerprint)
    assert len(seen) == 4
