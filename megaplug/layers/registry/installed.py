"""The entry points of other packages that declare layers, found without reading the metadata of all."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "megaplug.layers"

_METADATA_FOLDERS = (".dist-info", ".egg-info")


def entry_points() -> Sequence[EntryPoint]:
    """The entry points of all packages that can be imported now."""
    folders = [Path(entry or ".") for entry in sys.path]
    changed = tuple((str(f), f.stat().st_mtime_ns) for f in folders if f.exists())
    return _entry_points_in(changed, _other_finders())


@functools.lru_cache(maxsize=1)
def _entry_points_in(folders: tuple[tuple[str, int], ...], elsewhere: bool) -> Sequence[EntryPoint]:
    """Those of the packages in folders as they were last changed: looking is dear, and often asked."""
    if not elsewhere and not any(_may_declare(folder) for folder, _ in folders):
        return ()
    # A twentieth of a second among the packages of a torch environment, mostly for nothing.
    from importlib import metadata

    return tuple(metadata.entry_points(group=ENTRY_POINT_GROUP))


def _other_finders() -> bool:
    """Whether packages are found in another way than in the folders of ``sys.path``."""
    return any(finder is not PathFinder and hasattr(finder, "find_distributions") for finder in sys.meta_path)


def _may_declare(place: str) -> bool:
    """Whether a package in an entry of ``sys.path`` names the group; of archives it is not known."""
    if not Path(place).is_dir() or place.endswith(".egg"):
        return True
    with os.scandir(place) as entries:
        infos = [entry.path for entry in entries if entry.name.endswith(_METADATA_FOLDERS)]
    return any(_names_the_group(f"{info}/entry_points.txt") for info in infos)


def _names_the_group(file: str) -> bool:
    try:
        with open(file, "rb") as opened:  # noqa: PTH123  a Path for every package takes longer than reading it
            return ENTRY_POINT_GROUP.encode() in opened.read()
    except (FileNotFoundError, NotADirectoryError):
        return False
