"""What a checkpoint says it holds: names, shapes and number formats, and where each object lies.

torch writes this to ``.metadata``, a pickle. It is read here without torch, and without any of the classes
that it names: each name that a checkpoint needs becomes a holder of values that can do nothing, and any other
name is refused.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors
from megaplug.runs.metadata_scan import ALLOWED_GLOBALS
from megaplug.runs.restricted import RefusedNameError, restricted_load

METADATA = ".metadata"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: As Megatron calls it; the layers of a model are one tensor, their first dimension the layer.
        shape: Of the whole tensor, whoever wrote its parts.
        dtype: As torch spells it, without ``torch.``.
        num_parts: How many parts it was saved in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_parts: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class StoredObject:
    """A pickled object of a checkpoint, such as random states and Megatron's arguments.

    Attributes:
        name: As Megatron calls it.
        file: Below the checkpoint.
        offset: Where it begins there, in bytes.
        length: In bytes.
        transformed: Whether it is compressed or the like.
    """

    name: str
    file: str
    offset: int
    length: int
    transformed: bool


@dataclass(frozen=True)
class Stored:
    """The contents of a checkpoint.

    Attributes:
        tensors: By name.
        objects: By name.
        files: All files that hold any of it.
    """

    tensors: list[StoredTensor]
    objects: list[StoredObject]
    files: frozenset[str]


def read_stored(checkpoint: Path) -> Stored:
    """What a checkpoint holds.

    Args:
        checkpoint: A folder with a ``.metadata``.

    Raises:
        UserError: The file cannot be read, names what no checkpoint needs, or is none of a checkpoint.
    """
    path = checkpoint / METADATA
    with disk_errors(path, "read"):
        content = path.read_bytes()
    try:
        found = restricted_load(io.BytesIO(content), _inert)
        known, places = found.state["state_dict_metadata"], found.state["storage_data"]
        pieces = [(index.state["fqn"], info.state) for index, info in places.items()]
        tensors, objects = [], []
        for name, about in known.items():
            if about.name == "TensorStorageMetadata":
                properties = about.state["properties"].state
                dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
                size, chunks = about.state["size"], about.state["chunks"]
                tensors.append(StoredTensor(name, tuple(size), dtype.name, len(chunks)))
        kinds = {name: about.name for name, about in known.items()}
        for name, info in pieces:
            if kinds[name] == "BytesStorageMetadata":
                transformed = bool(info.get("transform_descriptors"))
                place = info["relative_path"], info["offset"], info["length"]
                objects.append(StoredObject(name, *place, transformed))
        files = frozenset(str(info["relative_path"]) for _, info in pieces)
    except Exception as error:  # whatever a broken or crafted pickle raises
        raise UserError(
            f"{path} cannot be understood: {error}", hint="the checkpoint is damaged", exit_code=1
        ) from error
    return Stored(sorted(tensors, key=lambda one: one.name), sorted(objects, key=lambda one: one.name), files)


class _Inert:
    """Stands for a class of torch or Megatron: it takes any values and does nothing with them."""

    name = ""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _inert(module: str, name: str) -> Any:
    """What stands for a name: plain values and `_Inert` ones."""
    if (module, name) not in ALLOWED_GLOBALS:
        raise RefusedNameError(module, name)
    if (module, name) == ("torch", "Size"):
        return tuple
    if module == "collections":
        return dict
    if module.startswith("pathlib"):
        return PurePosixPath
    if module == "torch":
        found = _Inert()
        found.name = name
        return found
    return type(name, (_Inert,), {"name": name})
