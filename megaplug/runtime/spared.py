"""What a rank is spared while it starts: packages that others import in case somebody needs them.

A third of the time from ``python`` to the first step on a CPU goes into them. Nothing is missed: each is left
out only where the job does not use it, and can be imported as ever once Megatron is there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# Those that read their files without transformers.
_OWN_TOKENIZERS = ("NullTokenizer", "SentencePieceTokenizer", "TikTokenizer")


def unused_packages(megatron_args: Sequence[str]) -> list[str]:
    """What Megatron imports at its top if it is installed, and does not use under these words of its own."""
    words = list(megatron_args)
    unused = [] if "--wandb-project" in words else ["wandb"]
    if "--tokenizer-type" in words and words[words.index("--tokenizer-type") + 1] in _OWN_TOKENIZERS:
        unused.append("transformers")
    return unused


@contextlib.contextmanager
def kept_out(names: Sequence[str]) -> Iterator[None]:
    """Inside the block nobody can import these packages, as if they were not installed.

    Those that are imported already stay.
    """
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def compile_nothing() -> bool:
    """Where torch is told to compile nothing, its compiler is not loaded either.

    ``torch.compile`` imports the whole of it before it asks, and Megatron calls that at its top.

    Returns:
        Whether there will be no compiler.
    """
    if os.environ.get("TORCH_COMPILE_DISABLE") != "1":
        return False
    namespace: Any = torch
    namespace.compile = _as_it_is
    return True


def _as_it_is(function: Any = None, **options: Any) -> Any:
    """In the place of ``torch.compile``, which may be called with options alone."""
    return function if function is not None else _as_it_is
