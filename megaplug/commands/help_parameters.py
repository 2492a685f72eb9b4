"""What ``--help`` says of the parameters of attentions."""

from __future__ import annotations

from megaplug.job.parameters import PARAMS, owners_of
from megaplug.layers.registry import Parameter
from megaplug.layers.registry.builtin import ATTENTIONS


def parameter_rows(name: str) -> list[tuple[str, list[str]]]:
    """A parameter as it is typed, with its default, and what is to be said of it; empty if there is none.

    Args:
        name: Such as ``block_size``, or ``attention.params`` for all parameters there are.
    """
    names = [name.removeprefix(f"{PARAMS}.")]
    if name == PARAMS:
        names = list(dict.fromkeys(each for plugin in ATTENTIONS for each in plugin.parameters))
    rows = []
    for each in names:
        if found := owners_of(each):
            parameter = found[0][1]
            of = ", ".join(plugin.name for plugin, _ in found)
            rows.append(
                (f"{PARAMS}.{each}={_typed(parameter)}", [parameter.doc, f"{_values(parameter)}; of {of}"])
            )
    return rows


def _typed(parameter: Parameter) -> str:
    value = parameter.default
    return "null" if value is None else "[]" if value == () else str(value)


def _values(parameter: Parameter) -> str:
    if parameter.choices:
        return " | ".join(map(str, parameter.choices))
    return {"int": "whole number", "list": "list of whole numbers"}.get(
        parameter.type.__name__, parameter.type.__name__
    ) + (", or null" if parameter.default is None else "")
