"""Parameters of the attentions that come with megaplug, by name: what a person may ask for or mistype."""

from __future__ import annotations

import typing

from megaplug.job import keys
from megaplug.job.suggest import closest
from megaplug.layers.registry import Parameter, Plugin
from megaplug.layers.registry.builtin import ATTENTIONS

PARAMS = "attention.params"


def owners_of(name: str) -> list[tuple[Plugin, Parameter]]:
    """The attentions that have a parameter of that name, and what each says of it."""
    return [(plugin, plugin.parameters[name]) for plugin in ATTENTIONS if name in plugin.parameters]


def parameter_meant(key: str) -> str:
    """The parameter that was meant by ``attention.<name>`` or its bare name, as it is typed; else empty.

    In the group a name that is like one is enough, unless it is more like a key of the group.
    """
    section, _, name = key.rpartition(".")
    if section not in ("", "attention"):
        return ""
    known = {name for plugin in ATTENTIONS for name in plugin.parameters}
    if section:
        name = closest(name, known | set(keys.section_keys(section))) or ""
    return f"{PARAMS}.{name}" if name in known else ""


def is_list(key: str) -> bool:
    """Whether a key, or a parameter of an attention, takes a list."""
    section, _, name = key.rpartition(".")
    if key.startswith((f"{PARAMS}.", "attention.pattern_params.")):
        return any(parameter.type is list for _, parameter in owners_of(name))
    if section not in keys.sections() or name not in keys.section_keys(section):
        return False
    hint = typing.get_type_hints(keys.sections()[section])[name]
    return any(typing.get_origin(part) is list for part in (hint, *typing.get_args(hint)))
