"""The one place that unpickles: every name that a pickle asks for is looked up by whoever reads it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO


class RefusedNameError(pickle.UnpicklingError):
    """A pickle asks for a name that what is read has no use for.

    Args:
        module: Where it is.
        name: It.
    """

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"it would import {module}.{name}, which no checkpoint needs")


def restricted_load(file: BinaryIO, find: Callable[[str, str], Any]) -> Any:
    """What a pickle holds.

    Args:
        file: It is read from where it stands.
        find: Given a module and a name, what is used in its place. It raises `RefusedNameError` for any that
            it does not expect; what it returns is called with values of the pickle's choice.

    Raises:
        UnpicklingError: The pickle is broken, or `RefusedNameError`; a broken one may raise anything else.
    """
    return _Unpickler(file, find).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, find: Callable[[str, str], Any]) -> None:
        super().__init__(file)
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        return self._find(module, name)
