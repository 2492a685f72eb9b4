"""A job's batch script: ``launch/templates/job.sbatch`` with its places filled in.

A line whose ``{{place}}`` has no value is left out, one whose place has several comes once for each, and a
paragraph of which only comments are left goes, too. A ``{{place|}}`` may be empty. Whoever gives a value
quotes it: for the shell, or for sbatch. What is in a value is never taken for a place.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# {{name}}, or with the space before it {{name|}}.
_PLACE = re.compile(r"\{\{(?P<needed>\w+)\}\}| ?\{\{(?P<optional>\w+)\|\}\}")

Values = Mapping[str, str | Sequence[str] | None]


def template_file() -> Path:
    """The shipped template: inside the package when it is installed, else beside it in the repository."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "templates" / "job.sbatch"
    return installed if installed.is_file() else package.parent / "launch" / "templates" / "job.sbatch"


def rendered(template: str, values: Values) -> str:
    """The template with its places filled in.

    Args:
        template: Its text.
        values: For each place a text, several, or None for none; empty lists and texts are none.

    Raises:
        KeyError: A place has no name among the values.
    """
    paragraphs = []
    for paragraph in template.split("\n\n"):
        lines = [line for raw in paragraph.split("\n") for line in _filled(raw, values)]
        if any(line and not line.startswith("# ") for line in lines):
            paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def _filled(line: str, values: Values) -> list[str]:
    needed = [match["needed"] for match in _PLACE.finditer(line) if match["needed"]]
    found = []
    for chosen in itertools.product(*(_texts(values[name]) for name in needed)):
        texts = dict(zip(needed, chosen, strict=True))

        def text_of(match: re.Match[str], texts: Mapping[str, str] = texts) -> str:
            if match["needed"]:
                return texts[match["needed"]]
            return "".join(f" {text}" for text in _texts(values[match["optional"]]))

        found.append(_PLACE.sub(text_of, line))
    return found


def _texts(value: str | Sequence[str] | None) -> list[str]:
    return [text for text in ([value] if isinstance(value, str) else value or ()) if text]
