"""What a rank unpickles of a checkpoint: names that a checkpoint needs, and no others.

torch's distributed checkpoints read ``.metadata`` with plain ``pickle.load``, and the objects in the shards
(random states, Megatron's arguments) with ``weights_only=False``: whoever made the checkpoint runs what they
like in every rank that loads it.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any, BinaryIO

import torch

from megaplug.runs.metadata_scan import ALLOWED_GLOBALS
from megaplug.runs.restricted import RefusedNameError, restricted_load


def _needed(module: str, name: str) -> Any:
    if (module, name) not in ALLOWED_GLOBALS:
        raise RefusedNameError(module, name)
    return getattr(importlib.import_module(module), name)


def _load(file: BinaryIO) -> Any:
    return restricted_load(file, _needed)


def restrict_metadata() -> None:
    """Read ``.metadata`` by a restricted unpickler."""
    from torch.distributed.checkpoint import filesystem

    own = types.ModuleType("pickle")
    own.__dict__.update({**vars(filesystem.pickle), "load": _load})
    filesystem.pickle = own


def restrict_objects() -> None:
    """Load the objects of shards with ``weights_only=True``; Megatron registers the classes that it needs.

    But for two pairs of plain values, which its rerun state machine saves with a step that it holds.
    """
    from megatron.core.rerun_state_machine import Call, Caller
    from torch.distributed.checkpoint import default_planner

    torch.serialization.add_safe_globals([Call, Caller])
    real = default_planner.DefaultLoadPlanner.load_bytes

    @functools.wraps(real)
    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        loaded, name = torch.load(value, weights_only=True), read_item.dest_index.fqn
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    default_planner.DefaultLoadPlanner.load_bytes = load_bytes
