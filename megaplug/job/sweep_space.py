"""What a sweep leaves open: keys and groups, with the values or the interval of numbers of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megaplug.job import keys
from megaplug.job.sweep_values import LOG, text_of, values

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Digits of a number that is chosen: more make no other run, and words that nobody can read.
_DIGITS = 6


@dataclass(frozen=True)
class Dimension:
    """A key or group, and what it may be: one of several values, or a number between two.

    Attributes:
        key: As it is typed.
        options: The values as they would be typed; empty for an interval.
        is_ordered: Whether these are numbers in their order.
        low: The least number of an interval.
        high: The greatest.
        is_whole: Whether only whole numbers are meant.
        is_log: Whether numbers are chosen evenly by their logarithm.
    """

    key: str
    options: tuple[str, ...] = ()
    is_ordered: bool = False
    low: float = 0.0
    high: float = 0.0
    is_whole: bool = False
    is_log: bool = False

    @property
    def is_interval(self) -> bool:
        """Whether it may be any number between two."""
        return not self.options

    def typed(self, number: float) -> str:
        """A number of an interval as it would be typed, not outside of the interval."""
        if self.is_whole:
            return str(int(number))
        return text_of(min(max(float(f"{number:.{_DIGITS}g}"), self.low), self.high))

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"options": list(self.options)}


@dataclass(frozen=True)
class Space:
    """All that a sweep leaves open.

    Attributes:
        fixed: The words that hold for every point.
        dimensions: What is open, in the order typed.
    """

    fixed: tuple[str, ...]
    dimensions: tuple[Dimension, ...]

    def first(self) -> tuple[str, ...]:
        """The words of a point that there is."""
        own = [
            f"{each.key}={each.options[0] if each.options else each.typed(each.low)}"
            for each in self.dimensions
        ]
        return (*self.fixed, *own)

    def check(self, chosen: Mapping[str, str]) -> None:
        """Be sure that values are those of a point.

        Raises:
            KeyError: One is missing.
            ValueError: One is none of what may be chosen.
        """
        for each in self.dimensions:
            text = chosen[each.key]
            if each.is_interval and not each.low <= float(text) <= each.high:
                raise ValueError(f"{each.key}={text} lies outside of {each.low:g} to {each.high:g}")
            if not each.is_interval and text not in each.options:
                raise ValueError(f"{each.key}={text} is none of {', '.join(each.options)}")

    def words(self, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """The words of a point that are its own.

        Args:
            chosen: A value for every key that is open.
        """
        return tuple(f"{each.key}={chosen[each.key]}" for each in self.dimensions)


def section_of(word: str) -> str:
    """The group of a word such as ``train.iters=5``, ``train=smoke`` or ``++train.iters=5``."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0]


def space_of(overrides: Sequence[Override], groups: Mapping[str, Sequence[str]]) -> Space:
    """Read it off words without a problem.

    Args:
        overrides: What was typed.
        groups: The options of every config group.
    """
    fixed = tuple(each.input_line or "" for each in overrides if not each.is_sweep_override())
    swept = [each for each in overrides if each.is_sweep_override()]
    return Space(fixed, tuple(_dimension(each, groups) for each in swept))


def _dimension(override: Override, groups: Mapping[str, Sequence[str]]) -> Dimension:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep

    key, value = override.get_key_element(), override.value()
    if not isinstance(value, IntervalSweep):
        options = tuple(dict.fromkeys(values(override, groups)))
        return Dimension(key, options, is_ordered=isinstance(value, RangeSweep))
    assert value.start is not None and value.end is not None
    # An interval of int(...) has whole bounds; without it Hydra reads them as decimals.
    is_whole = isinstance(value.start, int) or keys.is_whole_number(override.key_or_group)
    return Dimension(key, low=value.start, high=value.end, is_whole=is_whole, is_log=LOG in value.tags)
