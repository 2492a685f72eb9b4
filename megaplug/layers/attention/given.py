"""What a caller of the plain functions and modules gave, checked: whole numbers, and one of some names."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

from megaplug.errors import UserError


def whole(name: str, value: Any, hint: str = "give an integer of at least 1", verb: str = "is") -> int:
    """The value as Python's integer, at least 1; numpy's and torch's integers are integers, too.

    Raises:
        UserError: It is none, or less than 1.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UserError(f"{name} {verb} {value!r}", hint=hint)
    return number


def positive(name: str, value: Any, hint: str) -> float:
    """The value, a finite number above 0.

    Raises:
        UserError: It is none.
    """
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{name} is {value!r}", hint=hint)
    return number


def message_size(block_size: Any) -> int | None:
    """The size of a message in tokens, or None.

    Raises:
        UserError: It is neither.
    """
    if block_size is None:
        return None
    return whole("block_size", block_size, "give a number of tokens, such as 4096, or None")


def one_of(what: str, value: Any, names: Sequence[str]) -> None:
    """Refuse what is none of the names.

    Raises:
        UserError: It is another.
    """
    if value not in names:
        raise UserError(f"there is no {what} {value!r}", hint=f"one of: {', '.join(names)}")
