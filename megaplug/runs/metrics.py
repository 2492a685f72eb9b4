"""``metrics.jsonl`` and TensorBoard's events: cut back to the checkpoint when a run continues."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megaplug.runs.atomic import disk_errors, strict_json, write_bytes_atomic

_VALIDATION = " validation"  # Megatron's series: of a loss, a perplexity, each perhaps of one source
_VS_SAMPLES = " vs samples"  # Megatron logs these a second time over the number of samples, not of steps


def append_metrics(metrics_file: Path, line: Mapping[str, Any]) -> None:
    """Append one line (its keys stand at `read_metrics`); NaN and infinities become null.

    Raises:
        UserError: If the disk is full or may not be written to.
    """
    text = json.dumps(strict_json(line), allow_nan=False) + "\n"
    with disk_errors(metrics_file, "append to"), metrics_file.open("a") as file:
        file.write(text)


def read_metrics(metrics_file: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; a line torn by a crash is left out.

    A training step has ``iteration, loss, grad_norm, lr, tokens`` (consumed so far), ``seconds`` (of it)
    and ``tokens_per_second``; a validation has ``iteration, valid_loss, split``, and one
    more line with ``source`` for each source of a blend.
    """
    with disk_errors(metrics_file, "read"):
        try:
            content = metrics_file.read_text(errors="replace")
        except FileNotFoundError:
            return []
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("iteration"), int):
            lines.append(line)
    return lines


def is_validation(line: Mapping[str, Any]) -> bool:
    """Whether a line is a validation of the whole text: not of a test, nor of one source of a blend."""
    return "valid_loss" in line and line.get("split", "valid") == "valid" and "source" not in line


def validations(lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Step and loss of each validation of the whole text whose loss is a number."""
    return [
        (line["iteration"], line["valid_loss"])
        for line in lines
        if is_validation(line) and line["valid_loss"] is not None
    ]


def cut_metrics(metrics_file: Path, iteration: int) -> int:
    """Drop, atomically, what lies after a step, and torn lines. Returns the number of lines dropped."""
    if not metrics_file.exists():
        return 0
    with disk_errors(metrics_file, "read"):
        total = len(metrics_file.read_text(errors="replace").splitlines())
    kept = [line for line in read_metrics(metrics_file) if line["iteration"] <= iteration]
    if total > len(kept):
        write_bytes_atomic(metrics_file, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return total - len(kept)


def cut_tensorboard(
    directory: Path, iteration: int, samples: int | None = None, validations: int | None = None
) -> int:
    """Rewrite event files, atomically, without what lies after a step.

    Args:
        directory: Where the event files are; they are found in folders below it, too.
        iteration: The last step that stays.
        samples: The last sample count that stays, for Megatron's "... vs samples" series; None leaves these.
        validations: How often each of Megatron's validation series may have the last step; None leaves all. A
            run whose steps are all done validates once more at its end, whatever was cut short there before.

    Returns:
        The number of events dropped, not counting a torn last one.
    """
    paths = sorted(directory.rglob("events.out.tfevents.*"))
    if not paths:
        return 0
    from tensorboard.compat.proto.event_pb2 import Event

    dropped = 0
    seen: Counter[str] = Counter()
    for path in paths:
        with disk_errors(path, "read"):
            content = path.read_bytes()
        kept = []
        later = 0
        for record, payload in _records(content):
            event = Event.FromString(payload)
            if _is_later(event, iteration, samples) or _is_repeated(
                event, iteration, samples, validations, seen
            ):
                later += 1
            else:
                kept.append(record)
        cut = b"".join(kept)
        if len(cut) != len(content):
            write_bytes_atomic(path, cut)
        dropped += later
    return dropped


def _records(content: bytes) -> list[tuple[bytes, bytes]]:
    """The TFRecords of a file as (whole record, payload), up to the first torn one.

    A record is: length (uint64), its CRC (uint32), the payload, its CRC (uint32). Whole ones are copied.
    """
    records = []
    position = 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        end = position + 12 + length + 4
        if end > len(content):
            break
        records.append((content[position:end], content[position + 12 : end - 4]))
        position = end
    return records


def _is_later(event: Any, iteration: int, samples: int | None) -> bool:
    if event.summary.value and all(value.tag.endswith(_VS_SAMPLES) for value in event.summary.value):
        return samples is not None and event.step > samples
    return bool(event.step > iteration)


def _is_repeated(
    event: Any, iteration: int, samples: int | None, validations: int | None, seen: Counter[str]
) -> bool:
    """Whether a validation series has had its last step often enough; counts it otherwise."""
    tags = [value.tag for value in event.summary.value if _VALIDATION in value.tag]
    last = samples if tags and tags[0].endswith(_VS_SAMPLES) else iteration
    if validations is None or not tags or event.step != last:
        return False
    seen.update(tags)
    return any(seen[tag] > validations for tag in tags)
