"""Names that a person may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Fewer letters begin too many names.
_BEGINNING = 3


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like ``word``, or None when none is like it.

    The shortest that begins with it comes before those that only look like it: ``price`` is the beginning of
    ``price_per_gpu_hour``.
    """
    names = sorted(set(known))
    lower = {name.lower(): name for name in reversed(names)}
    begun = [name for name in lower if name.startswith(word.lower())] if len(word) >= _BEGINNING else []
    if begun:
        return lower[min(begun, key=lambda name: (len(name), name))]
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6)
    return lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], *, show: int = 12) -> str:
    """A hint: the closest name, and what there is to choose from when that is not too much to read.

    Args:
        word: What was written.
        known: What could have been written.
        show: The largest number of known names that is listed whole.
    """
    names = sorted(set(known))
    match = closest(word, names)
    listed = f"known: {', '.join(names)}" if 0 < len(names) <= show else ""
    if match is not None:
        return f"did you mean {match}?" + (f" ({listed})" if listed else "")
    return listed
