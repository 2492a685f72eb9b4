"""Lines, rows and files that are no documents: counted, and the first few kept with their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megaplug.errors import UserError

SHOWN = 5
"""How many are shown."""


@dataclass(frozen=True)
class Fault:
    """One of them.

    Attributes:
        path: The file.
        place: ``line``, ``row``, or empty for a whole file.
        number: Of the line or row, from 1.
        what: What is wrong with it.
        hint: What would be right.
    """

    path: str
    place: str
    number: int
    what: str
    hint: str = ""

    def __str__(self) -> str:
        where = {"line": f"{self.path}:{self.number}", "row": f"{self.path}, row {self.number}"}
        return f"{where.get(self.place, self.path)} {self.what}"


@dataclass
class Faults:
    """All of a part of a corpus.

    Attributes:
        bad: Their number.
        empty: Documents without text, which are left out whatever is configured.
        lines: Lines that were read, the blank ones too, so that those of the next part can be numbered.
        first: The first of them.
    """

    bad: int = 0
    empty: int = 0
    lines: int = 0
    first: list[Fault] = field(default_factory=list)

    def add(self, path: str, place: str, number: int, what: str, hint: str = "") -> None:
        """One more."""
        self.bad += 1
        if len(self.first) < SHOWN:
            self.first.append(Fault(path, place, number, what, hint))

    def append(self, later: Faults, lines_before: int = 0) -> None:
        """Those of a later part, whose lines begin after so many of the same file."""
        self.bad += later.bad
        self.empty += later.empty
        for fault in later.first[: SHOWN - len(self.first)]:
            number = fault.number + (lines_before if fault.place == "line" else 0)
            self.first.append(Fault(fault.path, fault.place, number, fault.what, fault.hint))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Faults:
        """What ``to_dict`` gave; raises TypeError or KeyError for anything else."""
        first = [Fault(**fault) for fault in values["first"]]
        return cls(**{**values, "first": first})

    def refuse(self) -> None:
        """Raises `UserError` if there is a bad one."""
        if not self.bad:
            return
        hint = next((fault.hint for fault in self.first if fault.hint), "")
        skip = "data.bad_lines=skip leaves them out" if self.bad > 1 else "data.bad_lines=skip leaves it out"
        hint = f"{hint}; {skip}" if hint else skip
        if self.bad == 1:
            raise UserError(f"data.path: {self.first[0]}", hint=hint)
        raise UserError(f"data.path: {self.summary('cannot be used')}\n{self.listed()}", hint=hint)

    def summary(self, what: str) -> str:
        """One line: how many, and what is done with them."""
        return f"{self.bad:,} {'lines or documents' if self.bad > 1 else 'line or document'} {what}"

    def listed(self) -> str:
        """The first of them, one a line, and how many more there are."""
        more = self.bad - len(self.first)
        rows = [f"  {fault}" for fault in self.first]
        return "\n".join([*rows, f"  and {more:,} more"] if more else rows)
