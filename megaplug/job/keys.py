"""Which configuration keys there are, read off the typed schema."""

from __future__ import annotations

import dataclasses
import functools
import typing

from megaplug.job.schema import Job

# Groups that hold whatever the plugin, Megatron or a device knows; other checks look into them.
OPEN_KEYS = (
    "attention.params",
    "attention.pattern_params",
    "moe.experts_params",
    "megatron",
    "slurm.environment",
    "slurm.options",
    "data.path",
    "data.valid_path",
    "data.test_path",
    "cluster.peak_tflops",
)


@functools.cache
def sections() -> dict[str, type]:
    """The dataclass of every config group that is a part of a job, by group name."""
    hints = typing.get_type_hints(Job)
    return {
        item.name: hints[item.name]
        for item in dataclasses.fields(Job)
        if isinstance(hints[item.name], type) and dataclasses.is_dataclass(hints[item.name])
    }


@functools.cache
def section_keys(section: str) -> tuple[str, ...]:
    """The keys of one group, in the order of the schema."""
    return tuple(item.name for item in dataclasses.fields(sections()[section]))


@functools.cache
def top_level_keys() -> tuple[str, ...]:
    """Groups and plain keys at the top of a job."""
    return tuple(item.name for item in dataclasses.fields(Job))


@functools.cache
def all_keys() -> tuple[str, ...]:
    """Every key in dotted form, such as ``train.iters``."""
    parts = sections()
    dotted: list[str] = []
    for name in top_level_keys():
        dotted.extend(f"{name}.{key}" for key in section_keys(name)) if name in parts else dotted.append(name)
    return tuple(dotted)


def is_whole_number(key: str) -> bool:
    """Whether the schema takes only whole numbers for ``key``."""
    section, _, leaf = key.rpartition(".")
    owner = sections().get(section) if section else Job
    hint = None if owner is None else typing.get_type_hints(owner).get(leaf)
    return hint is int or (hint is not None and set(typing.get_args(hint)) == {int, type(None)})


def is_open(key: str) -> bool:
    """Whether ``key`` lies inside a group that takes any key."""
    return any(key.startswith(f"{name}.") for name in OPEN_KEYS)


def is_known(key: str) -> bool:
    """Whether the schema has ``key``."""
    return key in all_keys() or key in top_level_keys() or is_open(key)
