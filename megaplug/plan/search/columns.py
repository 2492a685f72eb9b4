"""One formula over many configurations at once: numbers that are columns of numbers.

The models of memory and of time are written for one configuration. Given columns in place of its sizes they
answer for all of them, with numpy, and with the same result: a column behaves as the number it stands for.
Where a formula has to know it (``if``, ``min``, ``range``, a table's key), the configurations are parted into
those that answer alike, and the formula is asked for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class _Parted(Exception):  # noqa: N818 - no error: what a formula is interrupted with
    """A formula asked for something on which its configurations disagree."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        super().__init__()
        self.mask = mask


class Column(np.ndarray):
    """A column of numbers, or of truth values, that stands for one of them."""

    def _agreed(self) -> Any:
        """The value that all configurations have.

        Raises:
            _Parted: They have several.
        """
        values = np.asarray(self).reshape(-1)
        same = values == values[0]
        if not same.all():
            raise _Parted(same)
        return values[0].item()

    # A number that is added to is another number: nothing else may change with it.
    __iadd__ = np.ndarray.__add__  # type: ignore[assignment]
    __isub__ = np.ndarray.__sub__  # type: ignore[assignment]
    __imul__ = np.ndarray.__mul__  # type: ignore[assignment]
    __itruediv__ = np.ndarray.__truediv__  # type: ignore[assignment]
    __ifloordiv__ = np.ndarray.__floordiv__  # type: ignore[assignment]
    __imod__ = np.ndarray.__mod__  # type: ignore[assignment]
    __ipow__ = np.ndarray.__pow__  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return bool((self != 0).view(Column)._agreed())

    def __index__(self) -> int:
        return int(self._agreed())

    def __int__(self) -> int:
        return int(self._agreed())

    def __float__(self) -> float:
        return float(self._agreed())

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self._agreed())

    def __round__(self, digits: int | None = None) -> Column:
        return np.round(self, digits or 0).view(Column)

    def __ceil__(self) -> Column:
        return np.ceil(self).view(Column)

    def __floor__(self) -> Column:
        return np.floor(self).view(Column)

    def __trunc__(self) -> Column:
        return np.trunc(self).view(Column)


def in_parts(
    formula: Callable[..., Any], columns: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[NDArray[np.intp], Any]]:
    """What a formula says, for one part after the other of the configurations.

    Args:
        formula: Takes each column by its name; it is asked again wherever configurations have to be parted,
            so it must have no effect but its result.
        columns: Values by name, equally many of each.

    Yields:
        The rows of a part, and what the formula returned for them.
    """
    floats = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    size = len(next(iter(floats.values())))
    parts: list[NDArray[np.intp]] = [np.arange(size)] if size else []
    while parts:
        part = parts.pop()
        try:
            answer = formula(**{name: values[part].view(Column) for name, values in floats.items()})
        except _Parted as parted:
            parts += [part[~parted.mask], part[parted.mask]]
            continue
        yield part, answer


def by_columns(formula: Callable[..., Any], columns: Mapping[str, NDArray[Any]]) -> Numbers:
    """The number that a formula gives for every configuration; see `in_parts`."""
    found = np.empty(len(next(iter(columns.values()))))
    for part, answer in in_parts(formula, columns):
        found[part] = np.asarray(answer)
    return found
