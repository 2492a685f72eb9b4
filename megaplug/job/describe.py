"""Every configuration key with its type, default, choices, meaning, and the Megatron argument it becomes.

Schema, checks, translation and the comments in ``conf/`` know all of it; here it is put together.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any

from megaplug.job import keys
from megaplug.job.checks_values import CHOICES
from megaplug.job.compose import ConfigSource
from megaplug.job.conf_text import ConfText, default_options, option_text, read_conf
from megaplug.job.megatron_table import load_table
from megaplug.job.names import argument_keys
from megaplug.job.schema import Job
from megaplug.layers.registry.builtin import ATTENTIONS, BUILT_IN_EXPERTS

# Flags of Megatron's that follow from a key, with others or in another form.
FOLLOWING: dict[str, tuple[str, ...]] = {
    "runs_dir": ("--save",),
    "load": ("--load",),
    "load_state": ("--finetune",),
    "backend": ("--transformer-impl",),
    "device": ("--distributed-backend",),
    "model.vocab_size": ("--padded-vocab-size",),
    "attention.name": ("--spec",),
    "data.path": ("--train-data-path", "--valid-data-path", "--test-data-path"),
    "data.valid_path": ("--valid-data-path",),
    "data.test_path": ("--test-data-path",),
    "topology.zero": ("--use-distributed-optimizer", "--use-megatron-fsdp", "--ckpt-format"),
    "topology.fsdp": ("--use-torch-fsdp2", "--data-parallel-sharding-strategy"),
    "tokenizer.type": ("--tokenizer-type",),
    "tokenizer.path": ("--tokenizer-model",),
    "train.tokens": ("--train-iters",),
    "train.epochs": ("--train-iters",),
    "train.stop_at": ("--exit-interval",),
    "checkpoint.async_save": ("--async-save",),
    "checkpoint.async_strategy": ("--async-strategy", "--use-persistent-ckpt-worker"),
    "logging.tensorboard": ("--tensorboard-dir",),
    "logging.level": ("--logging-level",),
    "profile.kind": ("--profile",),
    "profile.wait": ("--profile-step-start",),
    "profile.active": ("--profile-step-end",),
    "profile.ranks": ("--profile-ranks",),
}
_TYPE_NAMES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Any: "text, list, or keys with values",
}


@dataclass(frozen=True)
class KeyInfo:
    """One key.

    Attributes:
        key: In dotted form, such as ``train.iters``.
        section: The config group that it is a part of; empty at the top.
        type: In words.
        default: As it is written in ``conf/``.
        choices: What it can be, where that is one of a few.
        meaning: The comment above it in ``conf/``.
        argument: Megatron's flag for the same value; empty where there is none.
        following: Flags of Megatron's that follow from it, with other keys or in another form.
    """

    key: str
    section: str
    type: str
    default: str
    choices: tuple[str, ...]
    meaning: str
    argument: str
    following: tuple[str, ...]

    @property
    def name(self) -> str:
        """Without its section."""
        return self.key.rpartition(".")[2]

    @property
    def is_open(self) -> bool:
        """Whether it holds further keys, which no schema knows."""
        return self.key in keys.OPEN_KEYS


def describe_keys(source: ConfigSource | None = None) -> list[KeyInfo]:
    """All keys, in the order of the schema."""
    source = source or ConfigSource()
    return [info for section in ("", *keys.sections()) for info in describe_section(section, source)]


def describe_section(section: str, source: ConfigSource | None = None) -> list[KeyInfo]:
    """The keys of one group, or those at the top for an empty name."""
    source = source or ConfigSource()
    if section:
        owner: type = keys.sections()[section]
        names = keys.section_keys(section)
        option = default_options(source.folders, source.name).get(section, "")
        text = option_text(source.folders, section, option)
    else:
        owner, names = Job, tuple(name for name in keys.top_level_keys() if name not in keys.sections())
        text = _primary(source)
    hints = typing.get_type_hints(owner)
    return [_describe(section, name, hints[name], text) for name in names]


def choices_of(key: str) -> tuple[str, ...]:
    """What a key can be, where that is one of a few."""
    if key in CHOICES:
        return CHOICES[key]
    if key == "attention.name":
        return tuple(plugin.name for plugin in ATTENTIONS)
    if key == "moe.experts":
        return ("auto", *(plugin.name for plugin in BUILT_IN_EXPERTS))
    argument = _arguments().get(key)
    found = load_table()[argument].choices if argument is not None else None
    return tuple(map(str, found or ()))


def option_header(group: str, option: str, source: ConfigSource) -> str:
    """What an option is, from the comment at the top of its file."""
    return option_text(source.folders, group, option).header


def _describe(section: str, name: str, hint: Any, text: ConfText) -> KeyInfo:
    key = f"{section}.{name}" if section else name
    argument, table = _arguments().get(key), load_table()
    return KeyInfo(
        key=key,
        section=section,
        type=type_name(hint),
        default=text.values.get(name, ""),
        choices=choices_of(key),
        meaning=text.comments.get(name, ""),
        argument=(table[argument].on or table[argument].off)[0] if argument is not None else "",
        following=FOLLOWING.get(key, ()),
    )


def type_name(hint: Any) -> str:
    """A type of the schema in words."""
    if isinstance(hint, types.UnionType):
        one, *_ = (part for part in typing.get_args(hint) if part is not type(None))
        return f"{type_name(one)}, or null"
    origin = typing.get_origin(hint)
    if origin is list:
        return f"list of {type_name(typing.get_args(hint)[0])}s"
    if origin is dict:
        return "keys with values"
    return _TYPE_NAMES[hint]


def _arguments() -> dict[str, str]:
    """Megatron's argument by the key of ours that sets it."""
    return {key: argument for argument, key in argument_keys().items()}


def _primary(source: ConfigSource) -> ConfText:
    files = [folder / f"{source.name}.yaml" for folder in source.folders]
    return next((read_conf(file) for file in files if file.is_file()), ConfText("", {}, {}, ()))


def as_json(infos: list[KeyInfo]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [dataclasses.asdict(info) for info in infos]
