"""Megatron's command-line arguments as data: how a value is written for its parser, and what it accepts.

``megaplug/runtime/arguments_table.py`` generates the table; reading it needs neither torch nor Megatron.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE_FILE = Path(__file__).with_name("megatron_arguments.json")


@dataclass(frozen=True)
class MegatronArgument:
    """One argument of Megatron's parser.

    Attributes:
        dest: Its name on the parsed arguments, and in ``megatron.<dest>``.
        kind: ``store``, ``store_true``, ``store_false`` or ``boolean_optional``.
        on: Flags that give a value, or switch a boolean on.
        off: Flags that switch a boolean off.
        type: ``int``, ``float``, ``bool``, ``str``, or the name of Megatron's own conversion.
        nargs: None for one value; ``+``, ``*`` or a number for several.
        choices: The accepted values, if there are few.
        default: What holds when it is not given.
        help: The first line of Megatron's explanation.
    """

    dest: str
    kind: str
    on: tuple[str, ...]
    off: tuple[str, ...]
    type: str
    nargs: str | int | None
    choices: tuple[Any, ...] | None
    default: Any
    help: str

    @property
    def is_switch(self) -> bool:
        """Whether it is a flag without a value."""
        return self.kind != "store"

    def fault(self, value: Any) -> str:
        """Why ``value`` is not accepted; empty if it is."""
        if value is None:
            return ""
        if self.is_switch:
            if not isinstance(value, bool):
                return f"takes true or false, not {value!r}"
            if value != self.default and not (self.on if value else self.off) and self.default is not None:
                return f"cannot be set to {value}: Megatron has no flag for it"
            return ""
        values = value if isinstance(value, list | tuple) else [value]
        if self.nargs is None and isinstance(value, list | tuple):
            return f"takes one value, not the list {list(value)}"
        if self.nargs == "+" and not values:
            return "takes at least one value, not an empty list"
        if isinstance(self.nargs, int) and len(values) != self.nargs:
            return f"takes {self.nargs} values, not {len(values)}"
        return next((fault for fault in map(self._fault_of_one, values) if fault), "")

    def _fault_of_one(self, value: Any) -> str:
        if self.type == "int" and (isinstance(value, bool) or not _converts(int, value)):
            return f"takes a whole number, not {value!r}"
        if self.type == "float" and (isinstance(value, bool) or not _converts(float, value)):
            return f"takes a number, not {value!r}"
        if self.type == "bool" and not isinstance(value, bool):
            return f"takes true or false, not {value!r}"
        if self.choices is not None and _plain(value) not in {_plain(choice) for choice in self.choices}:
            return f"is {value!r}, but can only be one of {', '.join(map(str, self.choices))}"
        return ""

    def render(self, value: Any) -> list[str]:
        """The words of a command line that give this argument ``value``; None means: leave the default.

        Raises:
            ValueError: ``value`` is not accepted.
        """
        fault = self.fault(value)
        if fault:
            raise ValueError(f"megatron.{self.dest} {fault}")
        if value is None:
            return []
        if self.is_switch:
            flags = self.on if value else self.off
            # A boolean that has no flag for this value has it by default.
            return [flags[0]] if flags else []
        if self.type == "bool":
            # Megatron calls bool() on the text, which is true for every text but the empty one.
            return [self.on[0], "True" if value else ""]
        if isinstance(value, list | tuple):
            return [self.on[0], *map(_text, value)]
        text = _text(value)
        # A value with a leading dash that is no number would be read as a flag.
        if text.startswith("-") and not _converts(float, text):
            return [f"{self.on[0]}={text}"]
        return [self.on[0], text]


@functools.cache
def load_table() -> dict[str, MegatronArgument]:
    """Megatron's arguments by destination name."""
    raw = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    return {
        dest: MegatronArgument(
            dest=dest,
            kind=entry["kind"],
            on=tuple(entry["on"]),
            off=tuple(entry["off"]),
            type=entry["type"],
            nargs=entry["nargs"],
            choices=None if entry["choices"] is None else tuple(entry["choices"]),
            default=entry["default"],
            help=entry["help"],
        )
        for dest, entry in raw.items()
    }


def _converts(kind: type[int] | type[float], value: Any) -> bool:
    # A fraction is not silently cut down to a whole number.
    if kind is int and isinstance(value, float):
        return False
    try:
        kind(value)
    except (TypeError, ValueError):
        return False
    return True


def _plain(value: Any) -> str:
    return str(value)


def _text(value: Any) -> str:
    # repr keeps every digit of a float, which the identity of a run relies on.
    return repr(value) if isinstance(value, float) else str(value)
