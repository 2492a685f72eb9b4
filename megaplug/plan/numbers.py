"""The smaller and the larger of two numbers, for plain numbers and for columns of them.

``min`` and ``max`` ask which is which, and so part the columns of ``plan/search/columns.py``; these do not.
"""

from __future__ import annotations

import numpy as np


def least(first: float, second: float) -> float:
    """The smaller of two."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        smaller: float = np.minimum(first, second)
        return smaller
    return min(first, second)


def most(first: float, second: float) -> float:
    """The larger of two."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        larger: float = np.maximum(first, second)
        return larger
    return max(first, second)
