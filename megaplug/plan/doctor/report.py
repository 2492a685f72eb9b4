"""The findings as a table for people and as JSON for programs.

Written with Python's own modules only: who asks the doctor may have nothing else that works.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TextIO

import megaplug
from megaplug.plan.doctor.finding import Finding, can_train

# What a status is called, and its colour in a terminal (SGR codes).
_MARKS = {
    "ok": ("ok", "32"),
    "absent": ("none", "2"),
    "warning": ("warn", "33"),
    "broken": ("BROKEN", "1;31"),
}
_MARK_WIDTH = 8
# A pipe has no width of its own; 80 columns would break most paths.
_WIDTH_OF_A_PIPE = 120


def as_json(findings: Sequence[Finding]) -> str:
    """One object: the version, whether it can train, and the findings in order."""
    answer = {
        "megaplug": megaplug.__version__,
        "can_train": can_train(findings),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(answer, indent=2)


def print_table(findings: Sequence[Finding], stream: TextIO | None = None) -> None:
    """A line a finding, its cure below it, and what follows from all of them at the end."""
    stream = stream or sys.stdout
    terminal = stream.isatty()
    width = shutil.get_terminal_size().columns if terminal else _WIDTH_OF_A_PIPE
    name_width = max(len(finding.name) for finding in findings) + 2
    indent = " " * (_MARK_WIDTH + name_width)
    for finding in findings:
        word, colour = _MARKS[finding.status]
        lines = _wrapped(finding.value, width - len(indent))
        if finding.cure:
            lines += _wrapped(f"cure: {finding.cure}", width - len(indent))
        mark = _coloured(word.ljust(_MARK_WIDTH), colour, terminal)
        print(mark + finding.name.ljust(name_width) + f"\n{indent}".join(lines), file=stream)
    print(_coloured(f"\n{verdict(findings)}", "1", terminal), file=stream)


def _wrapped(text: str, width: int) -> list[str]:
    # commands and paths are to be copied: they are not broken at hyphens or inside
    return textwrap.wrap(text, max(width, 40), break_on_hyphens=False, break_long_words=False)


def _coloured(text: str, code: str, terminal: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if terminal else text


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence: whether this machine trains, and what to look at."""
    broken = [finding.name for finding in findings if finding.status == "broken"]
    warned = [finding.name for finding in findings if finding.status == "warning"]
    if broken:
        return f"This machine cannot train until this is mended: {', '.join(broken)}."
    if warned:
        return f"This machine can train; worth a look: {', '.join(warned)}."
    return "This machine can train."
