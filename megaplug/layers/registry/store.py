"""The known declarations, and those that other packages add through an entry point."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from megaplug.errors import UserError
from megaplug.layers.registry.installed import entry_points
from megaplug.layers.registry.plugin import Plugin

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_REGISTERED: dict[tuple[str, str], Plugin] = {}


def register(plugin: Plugin) -> Plugin:
    """Make a declaration known in this process; the same declaration may come twice.

    Raises:
        UserError: The name is taken by another declaration, or the target is no ``module:attribute``.
    """
    module, _, attribute = plugin.target.partition(":")
    if not module or not attribute:
        raise UserError(
            f"the {plugin.kind} {plugin.name!r} has the target {plugin.target!r}",
            hint="a target is written module:attribute, such as my_package.attention:MyAttention",
        )
    known = _REGISTERED.setdefault((plugin.kind, plugin.name), plugin)
    if known != plugin:
        raise UserError(
            f"the {plugin.kind} {plugin.name!r} is declared twice: {known.target} and {plugin.target}",
            hint="rename one of them, or remove the package that declares it",
        )
    return plugin


def lookup(kind: str, name: str) -> Plugin:
    """The declaration of that kind and name, loading the entry points of that name first.

    Raises:
        UserError: There is none; the known names and the likeliest one are given.
    """
    for entry in entry_points():
        if entry.name == name:
            _load(entry)
    if (kind, name) in _REGISTERED:
        return _REGISTERED[kind, name]
    broken = _load_all()
    known = _known(kind)
    hint = f"known are: {', '.join(known) or 'none'}"
    if close := difflib.get_close_matches(name, known, n=1):
        hint = f"did you mean {close[0]!r}? {hint}"
    if broken:
        hint += "; not loaded: " + "; ".join(broken)
    raise UserError(f"there is no {kind} called {name!r}", hint=hint)


def names(kind: str) -> list[str]:
    """All names of that kind, sorted, those of other packages included.

    Raises:
        UserError: A package's declaration cannot be loaded.
    """
    if broken := _load_all():
        raise UserError("; ".join(broken), hint="mend or remove the package")
    return _known(kind)


def load_target(plugin: Plugin) -> Any:
    """Import the class that a declaration names. This may import torch.

    Raises:
        UserError: A required package is missing, or the target cannot be imported.
    """
    if missing := missing_packages(plugin):
        raise UserError(
            f"the {plugin.kind} {plugin.name!r} needs {', '.join(missing)}, which is not installed",
            hint="install it, or choose another",
        )
    module_name, _, attribute = plugin.target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the {plugin.kind} {plugin.name!r} cannot be imported from {plugin.target}: {error}",
            hint="is the package that declares it installed whole?",
        ) from error


def missing_packages(plugin: Plugin) -> list[str]:
    """The packages that the plugin requires and that are not installed; nothing is imported."""
    return [package for package in plugin.limits.requires if importlib.util.find_spec(package) is None]


def _known(kind: str) -> list[str]:
    return sorted(name for known_kind, name in _REGISTERED if known_kind == kind)


def _load_all() -> list[str]:
    """Load every entry point; the messages of those that cannot be loaded."""
    broken = []
    for entry in entry_points():
        try:
            _load(entry)
        except UserError as error:
            broken.append(error.message)
    return broken


def _load(entry: EntryPoint) -> None:
    """Register what an entry point names.

    Raises:
        UserError: It cannot be imported, is no ``Plugin``, or has another name than the entry point.
    """
    where = (
        f"the entry point {entry.name} = {entry.value!r} of {entry.dist.name if entry.dist else 'a package'}"
    )
    try:
        plugin = entry.load()
    except Exception as error:
        raise UserError(
            f"{where} cannot be imported: {error!r}", hint="mend or remove that package"
        ) from error
    if not isinstance(plugin, Plugin):
        raise UserError(f"{where} is {type(plugin).__name__}", hint="it has to be a megaplug Plugin")
    if plugin.name != entry.name:
        raise UserError(f"{where} declares {plugin.name!r}", hint="give both the same name")
    register(plugin)
