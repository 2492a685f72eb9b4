"""Hugging Face data sets on disk: the folders that ``save_to_disk`` of the ``datasets`` library writes.

Such a folder holds Arrow files and a ``state.json`` that names them; pyarrow streams them, and
``datasets`` itself is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaplug.errors import UserError

_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"


def is_set(folder: Path) -> bool:
    """Whether a folder is a data set, or a dictionary of them."""
    return (folder / _DICT).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())


def files_of_set(folder: Path) -> list[Path]:
    """The Arrow files of a data set; other files beside them, such as caches of ``map``, are none of it.

    Raises:
        UserError: It is a dictionary of several splits, or is not whole.
    """
    if (folder / _DICT).is_file():
        splits = _read(folder / _DICT).get("splits") or []
        raise UserError(
            f"data.path: {folder} is a dictionary of data sets, with the splits: {', '.join(splits)}",
            hint=f"name each: {_suggestion(folder, splits)}",
        )
    state = _read(folder / _STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"data.path: {folder} is a selection of the rows of its files",
            hint="write it anew with flatten_indices() and save_to_disk()",
        )
    try:
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"data.path: {folder / _STATE} names no _data_files") from error
    for file in files:
        if not file.is_file():
            raise UserError(f"data.path: {folder} lacks {file.name}, which its {_STATE} names")
    return files


def _suggestion(folder: Path, splits: list[str]) -> str:
    words = []
    for key, names in (
        ("data.path", ("train",)),
        ("data.valid_path", ("validation", "valid", "val", "dev")),
        ("data.test_path", ("test",)),
    ):
        words += [f"{key}={folder / split}" for split in splits if split in names][:1]
    return " ".join(words) or f"data.path={folder / splits[0] if splits else folder}"


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.path: {file} cannot be read: {error}", hint="write the data set anew"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"data.path: {file} holds no object", hint="write the data set anew")
    return values
