"""``action=show``: what is in a checkpoint, by its manifest and its ``.metadata``; nothing of it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaplug.commands.actions import Answer, columns
from megaplug.commands.checkpoint_words import Asked
from megaplug.errors import UserError
from megaplug.runs.atomic import size_text
from megaplug.runs.checkpoints import Checkpoint, tracked_step
from megaplug.runs.manifest import read_manifest, verify_manifest
from megaplug.runs.metadata_scan import scan_metadata
from megaplug.runs.stored import METADATA, Stored, StoredTensor, read_stored

_OPTIMIZER = "optimizer."
_LABELS = {"megaplug": "megaplug", "megatron_core": "Megatron-core", "torch": "torch"}


def answer(asked: Asked) -> Answer:
    """Everything about one checkpoint that can be known without reading all of it."""
    checkpoint, place = asked.checkpoint()
    manifest = read_manifest(checkpoint.path)
    faults = (
        verify_manifest(checkpoint.path, read=False) if checkpoint.path.is_dir() else ["it is not a folder"]
    )
    stored = _stored(checkpoint, faults)
    extra: Mapping[str, Any] = {} if manifest is None else manifest["extra"]
    files = {} if manifest is None else manifest["files"]
    tensors = [] if stored is None else stored.tensors
    weights = [one for one in tensors if not one.name.startswith(_OPTIMIZER)]
    report: dict[str, Any] = {
        "iteration": checkpoint.iteration,
        "path": str(checkpoint.path),
        "tracked": tracked_step(place.directory) == checkpoint.iteration,
        "complete": not faults,
        "faults": faults,
        "num_bytes": sum(entry["size"] for entry in files.values()),
        "num_weights": sum(one.num_elements for one in weights),
        "num_optimizer": sum(one.num_elements for one in tensors) - sum(one.num_elements for one in weights),
        "written_by": {key: value for key, value in extra.items() if key != "iteration"},
        "files": files,
        "tensors": [
            {"name": one.name, "shape": list(one.shape), "dtype": one.dtype, "num_parts": one.num_parts}
            for one in tensors
        ],
        "objects": [] if stored is None else sorted({one.name for one in stored.objects}),
    }
    every = asked.typed.get("tensors") == "all"
    return Answer(report, "\n".join(_text(report, tensors if every else weights, every)), 1 if faults else 0)


def _stored(checkpoint: Checkpoint, faults: list[str]) -> Stored | None:
    """What ``.metadata`` says, where there is one that is harmless; else why not goes to the faults."""
    path = checkpoint.path / METADATA
    if not path.is_file():
        return None
    if wrong := scan_metadata(path):
        faults += [fault for fault in wrong if fault not in faults]
        return None
    try:
        return read_stored(checkpoint.path)
    except UserError as error:
        faults.append(error.message)
        return None


def _text(report: dict[str, Any], tensors: list[StoredTensor], every: bool) -> list[str]:
    written = report["written_by"]
    rows = [("checkpoint", report["path"]), ("step", f"{report['iteration']:,}")]
    state = "complete (names and sizes; action=verify reads all of it)" if report["complete"] else "DAMAGED"
    rows.append(("files", f"{len(report['files'])}, {size_text(report['num_bytes'])}: {state}"))
    rows += [("", fault) for fault in report["faults"]]
    if report["tensors"]:
        numbers = f"{report['num_weights']:,} in weights, the vocabulary's padding included"
        rows.append(("numbers", f"{numbers}; {report['num_optimizer']:,} of the optimizer's"))
    if "job" in written:
        rows.append(("job", written["job"]))
    if isinstance(found := written.get("topology"), Mapping):
        rows.append(("topology", ", ".join(f"{key} {value}" for key, value in found.items())))
    if isinstance(found := written.get("versions"), Mapping):
        rows.append(
            ("versions", ", ".join(f"{_LABELS.get(key, key)} {value}" for key, value in found.items()))
        )
    if isinstance(found := written.get("model"), Mapping):
        pairs = [f"{key.removeprefix('model.')} {value}" for key, value in found.items() if value is not None]
        rows += [("model" if not line else "", text) for line, text in enumerate(_wrapped(pairs))]
    lines = [f"{label:<10}  {value}" for label, value in rows]
    if report["files"]:
        files = [(name, size_text(entry["size"]), entry["sha256"]) for name, entry in report["files"].items()]
        lines += ["", *columns([("file", "size", "SHA-256"), *files], left=(0, 2))]
    if tensors:
        cells = [
            (one.name, " x ".join(map(str, one.shape)) or "one number", one.dtype, str(one.num_parts))
            for one in tensors
        ]
        lines += ["", *columns([("tensor", "shape", "format", "parts"), *cells], left=(0, 1, 2))]
    if not every and (more := len(report["tensors"]) - len(tensors)):
        lines.append(f"and {more} of the optimizer: tensors=all shows them")
    if report["objects"]:
        lines.append(f"and {len(report['objects'])} objects, such as random states and Megatron's arguments")
    return lines


def _wrapped(pairs: list[str], width: int = 90) -> list[str]:
    """The pairs, as many a line as fit."""
    lines = [""]
    for pair in pairs:
        if lines[-1] and len(lines[-1]) + len(pair) > width:
            lines.append("")
        lines[-1] += f", {pair}" if lines[-1] else pair
    return lines
