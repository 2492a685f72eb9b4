"""Whole numbers as people write them: ``15T``, ``300B``, ``1.5e12``, ``300_000``."""

from __future__ import annotations

import re
from decimal import Decimal

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_NUMBER = re.compile(r"(\d+(?:[._]\d+)*(?:e\+?\d+)?)([a-zA-Z]?)")
_COMMA = re.compile(r"\d+,\d+[a-zA-Z]?")
ENDINGS = "k M B T"


def count_of(text: str) -> int | None:
    """The number, above 0, with the ending k, M, G (or B) or T for thousands and so on; else None."""
    found = _NUMBER.fullmatch(text)
    factor = None if found is None else _FACTORS.get(found[2].lower())
    if found is None or factor is None or found[1].count(".") > 1:
        return None
    number = Decimal(found[1].replace("_", "")) * factor
    return int(number) if number >= 1 and number == int(number) else None


def decimal_comma(text: str) -> str:
    """The same number with a point where it was written with a comma; empty if it was not."""
    return text.replace(",", ".") if _COMMA.fullmatch(text) else ""
