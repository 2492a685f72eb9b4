"""A user's parameters for a plugin, checked against its declaration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.layers.registry.plugin import Parameter, Plugin

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def validate_params(
    plugin: Plugin, params: Mapping[str, Any], key: str = "attention.params"
) -> list[Problem]:
    """What is wrong with a user's parameters: unknown names, wrong types, impossible values."""
    problems = []
    for name, value in params.items():
        parameter = plugin.parameters.get(name)
        if parameter is None:
            close = difflib.get_close_matches(name, list(plugin.parameters), n=1)
            known = ", ".join(plugin.parameters) or "none"
            hint = (f"did you mean {close[0]!r}? " if close else "") + f"its parameters are: {known}"
            message = f"the {plugin.kind} {plugin.name!r} has no parameter {name!r}"
            problems.append(Problem(f"{key}.{name}", message, hint))
        elif not _is_a(value, parameter.type) and not (value is None and parameter.default is None):
            message = f"{value!r} is {type(value).__name__}, but {parameter.type.__name__} is needed"
            problems.append(Problem(f"{key}.{name}", message, _choices(parameter) or parameter.doc))
        elif parameter.choices and value not in parameter.choices:
            problems.append(Problem(f"{key}.{name}", f"{value!r} is not possible", _choices(parameter)))
    if not problems and plugin.check_params is not None:
        problems += plugin.check_params(params, key)
    return problems


def resolve_params(plugin: Plugin, params: Mapping[str, Any] = _NOTHING) -> dict[str, Any]:
    """Every parameter with its value: the user's, or the default.

    Raises:
        UserError: From ``validate_params``.
    """
    if problems := validate_params(plugin, params):
        raise UserError.from_problems(problems)
    return {name: params.get(name, parameter.default) for name, parameter in plugin.parameters.items()}


def _choices(parameter: Parameter) -> str:
    return f"one of: {', '.join(map(str, parameter.choices))}" if parameter.choices else ""


def _is_a(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, wanted) or (wanted is float and isinstance(value, int))
