"""Writes ``job/megatron_arguments.json`` from Megatron's own parser, so that checks need no torch.

``python -m megaplug.runtime.arguments_table`` rewrites the file; a test compares it with the parser.
"""

from __future__ import annotations

import argparse
import enum
import json
import sys
from typing import Any

from megaplug.job.megatron_table import TABLE_FILE
from megaplug.runs.atomic import write_text_atomic

_KINDS = {
    "_StoreAction": "store",
    "_StoreTrueAction": "store_true",
    "_StoreFalseAction": "store_false",
    "BooleanOptionalAction": "boolean_optional",
}


def build_table() -> dict[str, dict[str, Any]]:
    """Describe every argument of the installed Megatron.

    Returns:
        ``{dest: {kind, on, off, type, nargs, choices, default, help}}``. ``on`` are the flags that set a
        value or switch a boolean on, ``off`` those that switch it off.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    table: dict[str, dict[str, Any]] = {}
    for action in parser._actions:
        if action.dest == "help":
            continue
        entry = _describe(action)
        if action.dest in table:
            entry = _both_polarities(table[action.dest], entry)
        table[action.dest] = entry
    return dict(sorted(table.items()))


def _describe(action: argparse.Action) -> dict[str, Any]:
    kind = _KINDS[type(action).__name__]
    flags = list(action.option_strings)
    if kind == "boolean_optional":
        off = [flag for flag in flags if flag.startswith("--no-")]
    else:
        off = flags if kind == "store_false" else []
    help_lines = (action.help or "").strip().splitlines()
    return {
        "kind": kind,
        "on": [flag for flag in flags if flag not in off],
        "off": off,
        "type": _type_name(action),
        "nargs": action.nargs if kind == "store" else None,
        "choices": None if action.choices is None else [_plain(choice) for choice in action.choices],
        "default": _plain(action.default),
        "help": help_lines[0].strip()[:160] if help_lines else "",
    }


def _type_name(action: argparse.Action) -> str:
    if type(action).__name__ != "_StoreAction":
        return "bool"
    if action.choices and all(isinstance(choice, enum.Enum) for choice in action.choices):
        return "str"
    if action.type is None:
        return "str"
    return getattr(action.type, "__name__", str(action.type))


def _both_polarities(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two actions with one destination: a store_true and a store_false make one boolean."""
    kinds = {first["kind"], second["kind"]}
    if kinds != {"store_true", "store_false"}:
        raise RuntimeError(f"two arguments for one destination: {first['on']} and {second['on']}")
    on, off = (first, second) if first["kind"] == "store_true" else (second, first)
    return {**on, "kind": "boolean_optional", "off": off["off"]}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def render_table() -> str:
    """The JSON text of the table, one argument a line so that a new Megatron gives a readable diff."""
    lines = [f"{json.dumps(dest)}: {json.dumps(entry)}" for dest, entry in build_table().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Rewrite the table that is shipped."""
    write_text_atomic(TABLE_FILE, render_table())
    print(f"wrote {TABLE_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
