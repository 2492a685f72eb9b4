"""Writes docs/keys.md, the reference of every key: ``python -m megaplug.commands.reference``.

It is generated from the schema, the checks and the comments in ``conf/``; a test compares it with the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megaplug.commands import cli
from megaplug.errors import UserError
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, conf_dir, group_options
from megaplug.job.conf_text import default_options
from megaplug.job.describe import KeyInfo, describe_section, option_header
from megaplug.runs.atomic import write_text_atomic

RENEW = "python -m megaplug.commands.reference"
_INTRODUCTION = f"""\
# Every key

Written by `{RENEW}` from the schema, the checks and the comments in `conf/`; not to be edited.
`python launch/train.py --help train.tokens` says the same of one key, `--help train` of one group, and
`--help --json` of all, for a program. `key=value` behind the command changes a key, `group=option` a group.
"""


def reference_file() -> Path:
    """Where the reference stands in a clone.

    Raises:
        UserError: This is no clone.
    """
    folder = conf_dir().parent / "docs"
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", hint="the reference is written in a clone")
    return folder / "keys.md"


def reference_text() -> str:
    """The whole reference as Markdown."""
    source = ConfigSource()
    groups, chosen = group_options(source), default_options(source.folders, source.name)
    blocks = [_INTRODUCTION, "## Keys of no group\n", _table(describe_section("", source))]
    for section in dict.fromkeys([*keys.sections(), *groups]):
        blocks.append(f"## {section}\n")
        if options := groups.get(section, []):
            rows = [
                (f"`{section}={name}`{' (default)' if chosen.get(section) == name else ''}", name)
                for name in options
            ]
            lines = [f"| {shown} | {_cell(option_header(section, name, source))} |" for shown, name in rows]
            blocks.append("\n".join(["| option | what it is |", "|---|---|", *lines, ""]))
        if section in keys.sections():
            blocks.append(_table(describe_section(section, source)))
    return "\n".join(blocks)


def _table(infos: list[KeyInfo]) -> str:
    head = ["| key | type | default | meaning | Megatron's argument |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(_row, infos), ""])


def _row(info: KeyInfo) -> str:
    kind = info.type
    if info.choices:
        null = ["null"] if info.type.endswith("or null") else []
        kind = ", ".join(f"`{choice}`" for choice in [*info.choices, *null])
    megatron = f"`{info.argument}`" if info.argument else ""
    if info.following:
        megatron = "decides " + ", ".join(f"`{flag}`" for flag in info.following)
    cells = [f"`{info.key}`", kind, f"`{info.default}`", _cell(info.meaning), megatron]
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that does not end its cell, nor is taken for HTML."""
    outside = text.split("`")
    outside[::2] = [part.replace("<", "&lt;") for part in outside[::2]]
    return "`".join(outside).replace("|", "\\|")


def main() -> int:
    """Write the reference; returns the exit code."""

    def write() -> int:
        file = reference_file()
        write_text_atomic(file, reference_text())
        print(f"wrote {file}")
        return 0

    return cli.guarded(write)


if __name__ == "__main__":
    sys.exit(main())
