"""The smaller, the larger and the chosen of two numbers, for plain numbers and for columns of them.

``min``, ``max`` and ``if`` ask which is which, and so part the columns of ``plan/search/columns.py``; these
do not. numpy takes a tenth of a second to import, which a plan of one job can do without: where it has not
been imported, nothing can be a column.
"""

from __future__ import annotations

import sys
from typing import Any


def least(first: Any, second: Any) -> Any:
    """The smaller of two."""
    numpy = _of_columns(first, second)
    return numpy.minimum(first, second) if numpy else min(first, second)


def most(first: Any, second: Any) -> Any:
    """The larger of two."""
    numpy = _of_columns(first, second)
    return numpy.maximum(first, second) if numpy else max(first, second)


def where(condition: Any, first: Any, second: Any) -> Any:
    """The first where the condition holds, else the second; both are worked out."""
    numpy = _of_columns(condition, first, second)
    if numpy:
        return numpy.where(condition, first, second)
    return first if condition else second


def _of_columns(*values: Any) -> Any:
    """Numpy if any of the values is a column; None for plain numbers."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    # A search asks a hundred thousand times.
    for value in values:
        if isinstance(value, numpy.ndarray):
            return numpy
    return None
