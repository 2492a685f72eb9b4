"""Asks of a user's parameters whether what they choose can be had: a device, a number format, a package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from megaplug.errors import Problem
from megaplug.layers.registry.plugin import Need, Plugin


def needs_problems(
    plugin: Plugin,
    params: Mapping[str, Any],
    *,
    device: str | None,
    dtype: str | None = None,
    key: str = "attention.params",
) -> list[Problem]:
    """What parameters choose that the device, the number format or the installed packages do not allow.

    Args:
        plugin: The declaration.
        params: The user's, which ``validate_params`` has found nothing wrong with.
        device: ``cpu`` or ``cuda``; where it is None nothing is asked.
        dtype: ``fp64``, ``fp32``, ``bf16`` or ``fp16``; None leaves it open.
        key: Under which the parameters stand.

    Returns:
        The problems; that of a missing package says what this machine lacks.
    """
    if device is None:
        return []
    problems = []
    for name, parameter in plugin.parameters.items():
        choice = params.get(name, parameter.default)
        need = parameter.needs.get(choice) if parameter.needs else None
        if need is None:
            continue
        others = [
            str(other)
            for other in parameter.choices
            if other != choice and _goes_with(parameter.needs.get(other), device, dtype)
        ]
        hint = f"use {name}={' or '.join(others)}" if others else f"leave {name} out"
        what, lacks = f"{name}={choice}", ""
        if device not in need.devices:
            message = f"{what} does not run on {device}"
        elif dtype is not None and need.dtypes and dtype not in need.dtypes:
            message = f"{what} has no {dtype}, only {' and '.join(need.dtypes)}"
        elif missing := [module for module in need.modules if not is_found(module)]:
            message = f"{what} needs {need.package}, which is not installed: there is no {missing[0]}"
            hint, lacks = f"install it, or {hint}", need.package
        else:
            continue
        problems.append(Problem(f"{key}.{name}", message, hint, lacks))
    return problems


def is_found(module: str) -> bool:
    """Whether a module can be imported; neither it nor a package above it is."""
    first, *between = module.split(".")
    top = importlib.util.find_spec(first)
    if top is None or not between:
        return top is not None
    folders = [Path(folder, *between[:-1]) for folder in top.submodule_search_locations or ()]
    return PathFinder.find_spec(module, [str(folder) for folder in folders]) is not None


def _goes_with(need: Need | None, device: str, dtype: str | None) -> bool:
    """Whether a choice needs nothing that would have to be installed, and not another device or format."""
    if need is None:
        return True
    formats = not need.dtypes or dtype is None or dtype in need.dtypes
    return device in need.devices and formats and not need.modules
