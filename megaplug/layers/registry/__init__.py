"""Declarations of layers: what a plugin is called, where its module is, what it takes and what it cannot do.

Nothing here imports torch, so that checks and the planner can ask a plugin before anything is launched.
Other packages add theirs through the entry-point group ``megaplug.layers``::

    [project.entry-points."megaplug.layers"]
    my_attention = "my_package.declaration:plugin"      # a Plugin, named like the entry point

The module that the entry point names is imported by the launcher, so it should not import torch either;
the plugin's ``target`` may.
"""

from __future__ import annotations

from megaplug.layers.registry.builtin import BUILT_IN
from megaplug.layers.registry.experts import ExpertsChoice
from megaplug.layers.registry.installed import ENTRY_POINT_GROUP
from megaplug.layers.registry.layers import AttentionLayers
from megaplug.layers.registry.limits import limits_problems
from megaplug.layers.registry.needs import needs_problems
from megaplug.layers.registry.params import resolve_params, validate_params
from megaplug.layers.registry.plugin import (
    CORE_ATTENTION,
    EXPERTS,
    AttentionSizes,
    Limits,
    Need,
    Parameter,
    Plugin,
)
from megaplug.layers.registry.store import (
    load_target,
    lookup,
    missing_packages,
    names,
    register,
)

__all__ = [
    "CORE_ATTENTION",
    "ENTRY_POINT_GROUP",
    "EXPERTS",
    "AttentionLayers",
    "AttentionSizes",
    "ExpertsChoice",
    "Limits",
    "Need",
    "Parameter",
    "Plugin",
    "limits_problems",
    "load_target",
    "lookup",
    "missing_packages",
    "names",
    "needs_problems",
    "register",
    "resolve_params",
    "validate_params",
]

for _plugin in BUILT_IN:
    register(_plugin)
