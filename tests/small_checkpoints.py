"""Small checkpoints made by hand, in the format that Megatron saves in: in milliseconds, without a run."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megaplug.runs.checkpoints import TRACKER
from megaplug.runs.manifest import read_manifest, write_manifest

COMMON = "common_state/shard_0_1"
STATE = {"iteration": 10, "rng": torch.arange(8, dtype=torch.uint8)}


class _AsMegatron(DefaultSavePlanner):
    """Objects come packed already."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object if isinstance(object, io.BytesIO) else super().transform_object(write_item, object)


def packed(value: Any) -> io.BytesIO:
    """As Megatron packs an object."""
    file = io.BytesIO()
    torch.save(value, file)
    return file


class RunsProgram:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def make_checkpoint(directory: Path, iteration: int, extra: Mapping[str, Any] | None = None) -> Path:
    """A whole checkpoint in a folder of checkpoints: two tensors and one object; the tracker names it."""
    folder = directory / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    state = {
        "output_layer.weight": torch.full((64, 32), float(iteration)),
        "optimizer.state.exp_avg.output_layer.weight": torch.zeros(64, 32, dtype=torch.bfloat16),
        COMMON: packed([STATE]),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True, planner=_AsMegatron(flatten_state_dict=False))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    write_manifest(folder, {"iteration": iteration, "job": "0123abcd", **(extra or {})})
    (directory / TRACKER).write_text(str(iteration))
    return folder


def craft_metadata(checkpoint: Path, marker: Path) -> None:
    """Put a program in its ``.metadata``; the manifest agrees."""
    path = checkpoint / ".metadata"
    path.write_bytes(pickle.dumps([pickle.loads(path.read_bytes()), RunsProgram(marker)]))  # noqa: S301  our own
    write_again(checkpoint)


def craft_object(checkpoint: Path, name: str, marker: Path) -> None:
    """Put a program in the place of an object of the shards; ``.metadata`` and the manifest agree."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301  our own
    (index,) = [index for index in metadata.storage_data if index.fqn == name]
    stored = metadata.storage_data[index]
    content = packed([{"iteration": 10, "args": RunsProgram(marker)}]).getvalue()
    shard = checkpoint / stored.relative_path
    metadata.storage_data[index] = _StorageInfo(stored.relative_path, shard.stat().st_size, len(content))
    with shard.open("ab") as file:
        file.write(content)
    path.write_bytes(pickle.dumps(metadata))
    write_again(checkpoint)


def craft_common(checkpoint: Path, marker: Path) -> None:
    """Add a ``common.pt`` of older Megatron with a program in it; the manifest agrees."""
    torch.save({"iteration": 10, "args": RunsProgram(marker)}, checkpoint / "common.pt")
    write_again(checkpoint)


def write_again(checkpoint: Path) -> None:
    """A manifest that agrees with the files as they are, as an attacker would write it."""
    before = read_manifest(checkpoint)
    assert before is not None
    write_manifest(checkpoint, before["extra"])
