"""The values that a word of a sweep names: ``1,2``, ``choice(...)``, ``range(...)``, ``glob(...)``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import product
from typing import TYPE_CHECKING, Any

from megaplug.errors import Problem
from megaplug.job import keys

# The tag of an interval whose numbers are drawn evenly by their logarithm.
LOG = "log"

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def sweep_problem(
    override: Override, groups: Mapping[str, Sequence[str]], *, intervals: bool = False
) -> Problem | None:
    """Why a word names no values one by one; None where it does.

    Args:
        override: One for which ``is_sweep_override`` holds.
        groups: The options of every config group.
        intervals: Whether a word may also name all numbers of an interval.
    """
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    if override.is_interval_sweep():
        if intervals:
            return _interval_problem(override, groups)
        hint = (
            f"name the values, {key}=A,B, or of numbers range(START,STOP,STEP); sweep=optuna chooses in an "
            "interval"
        )
        return Problem(key, f"{value} has no single values that could be run one by one", hint)
    if _is_glob(override) and key not in groups:
        hint = "glob() names options of a group, such as model=glob(tiny*)"
        return Problem(key, f"{value} names options, and this is no config group", hint)
    if not values(override, groups):
        hint = f"--help {key} lists the options" if key in groups else "its end is not one of its values"
        return Problem(key, f"{value} names nothing", hint)
    return None


def values(override: Override, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The values of a word without a `sweep_problem`, as they would be typed one by one."""
    from hydra.core.override_parser.types import Glob, RangeSweep

    value = override.value()
    if isinstance(value, Glob):
        return value.filter(list(groups[override.key_or_group]))
    if isinstance(value, RangeSweep):
        return _numbers(value.start, value.stop, value.step)
    return [text_of(item) for item in override.sweep_iterator()]


def combinations(overrides: Sequence[Override], groups: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Every combination of the values that a sweep names, in the order typed.

    ``topology.tp=1,2 train.seed=1,2`` makes four lists; without a sweep there is one.
    """
    choices = [
        [f"{override.get_key_element()}={value}" for value in values(override, groups)]
        if override.is_sweep_override()
        else [override.input_line or ""]
        for override in overrides
    ]
    return [list(point) for point in product(*choices)]


def _interval_problem(override: Override, groups: Mapping[str, Sequence[str]]) -> Problem | None:
    """Why no number can be chosen in an interval; None where one can."""
    from hydra.core.override_parser.types import IntervalSweep

    key, interval = override.key_or_group, override.value()
    value = (override.input_line or "").partition("=")[2]
    assert isinstance(interval, IntervalSweep) and interval.start is not None and interval.end is not None
    if key in groups or key in keys.sections():
        return Problem(key, f"{value} is of numbers, and this is a group", f"--help {key} lists it")
    if strange := sorted(interval.tags - {LOG}):
        return Problem(key, f"{value}: there is no tag {strange[0]!r}", "tag(log,interval(1e-4,1e-2))")
    if not math.isfinite(interval.start) or not math.isfinite(interval.end) or interval.start >= interval.end:
        return Problem(key, f"{value} holds no numbers", "the lower bound stands first")
    if LOG in interval.tags and interval.start <= 0:
        return Problem(key, f"{value} begins at {interval.start:g}, which has no logarithm", "begin above 0")
    whole = keys.is_whole_number(key)
    if whole and any(float(each) != int(each) for each in (interval.start, interval.end)):
        return Problem(key, f"{value} has bounds that are no whole numbers", "this key takes only these")
    return None


def text_of(item: Any) -> str:
    """As it was typed, as nearly as the grammar has kept it: of ``1e9`` it has made a number."""
    from hydra.core.override_parser.types import Transformer

    text = str(Transformer.str(item))
    if isinstance(item, bool):
        return text.lower()
    if not isinstance(item, float):
        return text
    short = f"{item:g}".replace("e+0", "e").replace("e+", "e")
    return short if len(short) < len(text) and float(short) == item else text


def _is_glob(override: Override) -> bool:
    from hydra.core.override_parser.types import Glob

    return isinstance(override.value(), Glob)


def _numbers(start: float | None, stop: float | None, step: float) -> list[str]:
    """As decimals: in binary, ``range(0.1,0.4,0.1)`` has 0.30000000000000004 and even 0.4."""
    assert start is not None and stop is not None
    number, end, by = (Decimal(str(each)) for each in (start, stop, step))
    found = []
    while by and (number < end if by > 0 else number > end):
        found.append(str(number))
        number += by
    return found
