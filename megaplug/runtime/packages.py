"""Lets Megatron find, or not find, Apex and Transformer Engine, before it looks for them at import.

A package is kept out by None in ``sys.modules``: Python then raises ``ModuleNotFoundError`` for it and for
all below it, as if it were not installed.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from megaplug.errors import UserError
from megaplug.job.packages import (
    INSTALLATION,
    MODULES,
    NAMES,
    WEIGHT_GRADIENTS,
    has_weight_gradient_fusion,
    why_not_taken,
)
from megaplug.job.schema import KernelsConfig

# What Megatron imports of each for optimizer and clipping; where one fails it takes the next in silence.
WANTED = {
    "apex": ("amp_C", "apex.multi_tensor_apply", "apex.optimizers"),
    "te": ("transformer_engine.pytorch.optimizers",),
}


@dataclass(frozen=True)
class Choice:
    """What became of one package.

    Attributes:
        key: ``apex`` or ``te``.
        reason: Why it is kept out; empty where Megatron finds it.
        is_news: The reason was not known before the rank started, so that a person has to be told.
    """

    key: str
    reason: str
    is_news: bool = False


def choose(kernels: KernelsConfig, device: str) -> list[Choice]:
    """Keep out what the job does not take, and make sure that the rest can be imported.

    Args:
        kernels: What the job says.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: A package is required and cannot be had here.
    """
    choices = []
    for key in ("te", "apex"):
        word = getattr(kernels, key)
        reason = why_not_taken(key, word, device)
        broken = "" if reason else _why_it_cannot_be_imported(key)
        if word == "require" and (reason or broken):
            raise UserError(
                f"kernels.{key}: {NAMES[key]} is required, but {reason or broken}",
                hint=f"{INSTALLATION}; or use kernels.{key}=auto",
                exit_code=1,
            )
        if reason or broken:
            keep_out(key)
        choices.append(Choice(key, reason or broken, is_news=bool(broken)))
    return choices


def arguments(choices: list[Choice]) -> list[str]:
    """What Megatron's parser has to be told beyond the frozen words, which were written without this rank.

    Its linear layers raise where weight gradients are to be fused and Apex's extension is kept out.
    """
    return [
        "--no-gradient-accumulation-fusion" for choice in choices if choice.key == "apex" and choice.reason
    ]


def keep_out(key: str) -> None:
    """From now on nobody can import the package behind ``kernels.<key>``, or any part of it."""
    for name in MODULES[key]:
        for loaded in [module for module in sys.modules if module.startswith(f"{name}.")]:
            del sys.modules[loaded]
        sys.modules[name] = None  # type: ignore[assignment]


def _why_it_cannot_be_imported(key: str) -> str:
    extension = (WEIGHT_GRADIENTS,) if key == "apex" and has_weight_gradient_fusion() else ()
    for name in (*WANTED[key], *extension):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            # A library that was built for another torch or CUDA, as a rule.
            said = str(error).strip().splitlines() or [type(error).__name__]
            return f"{name} cannot be imported: {said[0]}"
    return ""
