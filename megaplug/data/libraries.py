"""Libraries that only some forms of text and some tokenizers need: imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from megaplug.errors import UserError


def optional(module: str, what: str) -> ModuleType:
    """An optional library.

    Args:
        module: Its name in Python; its package is called as its first part is.
        what: What needs it, to name in the error.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{what} needs the package {package}, which is not installed",
            hint=f"pip install {package}, or all of them: pip install 'megaplug[data]'",
        ) from error
