"""Every key is described by what already knows it, and docs/keys.md says what is so today."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megaplug.commands import reference
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, compose_config, conf_dir, group_options
from megaplug.job.conf_text import option_text, read_conf
from megaplug.job.describe import FOLLOWING, KeyInfo, describe_keys
from megaplug.job.megatron_table import load_table

SOURCE = ConfigSource()
INFOS = {info.key: info for info in describe_keys(SOURCE)}
FILES = sorted(conf_dir().glob("*/*.yaml"))


def test_the_reference_is_current() -> None:
    written = (conf_dir().parent / "docs" / "keys.md").read_text()
    assert written == reference.reference_text(), f"docs/keys.md is not current; renew it: {reference.RENEW}"


def test_every_key_is_described_once_in_the_order_of_the_schema() -> None:
    top = [key for key in keys.all_keys() if "." not in key]
    assert list(INFOS) == [*top, *(key for key in keys.all_keys() if "." in key)]
    assert [key for key, info in INFOS.items() if not info.meaning] == []


def test_the_defaults_are_those_that_are_composed() -> None:
    config = compose_config([])
    for key, info in INFOS.items():
        node = config
        for part in key.split(".")[:-1]:
            node = node[part]
        # As composed, references not followed.
        composed = node._get_node(info.name)._value() if info.default.startswith("$") else node[info.name]
        written = info.default if isinstance(composed, str) else yaml.safe_load(info.default)
        # YAML 1.1 takes 1e-8 for a text.
        assert (float(written) if isinstance(composed, float) else written) == composed, key


@pytest.mark.parametrize(
    ("key", "type_name", "default", "choices", "argument"),
    [
        ("topology.tp", "whole number", "1", (), "--tensor-model-parallel-size"),
        ("train.tokens", "whole number, or null", "null", (), ""),
        ("train.recompute_method", "text, or null", "null", ("uniform", "block"), "--recompute-method"),
        ("load_state", "text", "weights", ("weights", "all", "upcycle"), ""),
        ("train.recompute_modules", "list of texts, or null", "null", (), "--recompute-modules"),
        ("attention.params", "keys with values", "{}", (), ""),
        ("launch.distributed_timeout_minutes", "whole number", "10", (), "--distributed-timeout-minutes"),
    ],
)  # fmt: skip
def test_type_choices_and_megatron_s_argument(
    key: str, type_name: str, default: str, choices: tuple[str, ...], argument: str
) -> None:
    info = INFOS[key]
    assert (info.type, info.default, info.choices, info.argument) == (type_name, default, choices, argument)


def test_what_follows_from_a_key_is_an_argument_of_megatron_s() -> None:
    flags = {flag for argument in load_table().values() for flag in argument.on}
    assert {flag for following in FOLLOWING.values() for flag in following} <= flags
    assert set(FOLLOWING) <= set(INFOS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_option_says_at_its_top_what_it_is(file: Path) -> None:
    header = read_conf(file).header
    assert header, f"{file}: its first line must be a comment on what it is, and a blank line must follow"


def test_an_option_inherits_keys_and_comments() -> None:
    text = option_text(SOURCE.folders, "lr", "wsd")
    assert (text.values["lr_decay_style"], text.values["lr"]) == ("WSD", "2.0e-3")
    assert text.comments["lr"] == "Highest learning rate."
    assert text.header.startswith("Warm up, stay")


def test_a_file_is_read_as_a_person_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# @package _global_\n# Mine,\n# and mine only.\ndefaults:\n  - override /lr: wsd\n  - _self_\n\n"
        '# Parts: "a,b".\nsplit: "95,5"  # not this\n# A group.\ntrain:\n  # Inside.\n  iters: 3\n'
    )
    text = read_conf(file)
    assert text.header == "Mine, and mine only."
    assert text.values == {"split": "95,5", "train": ""}
    assert text.comments == {"split": 'Parts: "a,b".', "train": "A group."}
    assert text.defaults == (("lr", "wsd"),)


def test_a_bar_or_a_bracket_does_not_break_the_table() -> None:
    info = KeyInfo("a.b", "a", "text", "x", (), "this | that, or <thing> and `<kept>`", "", ())
    assert r"this \| that, or &lt;thing> and `<kept>`" in reference._row(info)


def test_all_groups_are_in_the_reference() -> None:
    text = reference.reference_text()
    assert all(
        f"`{group}={option}`" in text
        for group, options in group_options(SOURCE).items()
        for option in options
    )
