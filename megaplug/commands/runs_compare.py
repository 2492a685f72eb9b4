"""``action=compare``: runs side by side, with a column for each key in which they differ, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megaplug.commands.actions import Answer, columns
from megaplug.commands.runs_list import HEADER, Row, cells, row_of
from megaplug.commands.runs_words import Asked
from megaplug.errors import UserError
from megaplug.job.differences import differing, shown
from megaplug.runs.comparison import draw_comparison
from megaplug.runs.folder import RunFolder

# Further keys are left to output=json.
_COLUMNS = 6


def answer(asked: Asked) -> Answer:
    """The runs that are named, or all."""
    folders = asked.runs()
    if len(folders) < 2:
        message = f"{folders[0].name} is the only run"
        raise UserError(message, hint="name several: run=[a,b] or run='tiny-*'")
    picture = Path(asked.typed.get("picture", folders[0].path.parent / "comparison.png")).expanduser()
    return compare(folders, picture)


def compare(folders: Sequence[RunFolder], picture: Path) -> Answer:
    """Runs side by side.

    Args:
        folders: Theirs.
        picture: Where that of their losses goes, where any of them has a step.
    """
    rows = [row_of(folder) for folder in folders]
    names = differing([row.keys for row in rows])
    is_drawn = draw_comparison({_label(row, names): row.folder.metrics_file for row in rows}, picture)
    lines = columns([(*HEADER[:-1], *names[:_COLUMNS]), *(_cells(row, names) for row in rows)], left=(0, 1))
    if more := names[_COLUMNS:]:
        lines.append(f"  they differ in {', '.join(more)} besides")
    if not names:
        lines.append("  their jobs do not differ in what they compute")
    lines.append(f"  picture  {picture}" if is_drawn else "  no picture: none of them has a step yet")
    report = {
        "runs": [row.as_json(names) for row in rows],
        "differing": names,
        "picture": str(picture) if is_drawn else None,
    }
    return Answer(report, "\n".join(lines))


def _cells(row: Row, names: list[str]) -> tuple[str, ...]:
    values = ["?" if row.keys is None else shown(row.keys.get(name)) for name in names[:_COLUMNS]]
    return (*cells(row)[:-1], *values)


def _label(row: Row, names: list[str]) -> str:
    """The run's folder, which no other has, and the first keys that set it apart."""
    values = [f"{name}={shown((row.keys or {}).get(name))}" for name in names[:3]]
    return f"{row.folder.name}: {' '.join(values)}" if values and row.keys is not None else row.folder.name
