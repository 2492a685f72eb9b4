"""By what a block is merged into what is there: torch's operations, or one kernel in Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.attention.given import one_of
from megaplug.layers.attention.rows import merge

MERGES = ("torch", "triton")
Merge = Callable[[list[Tensor], list[Tensor], Tensor, Tensor], None]


def choose_merge(name: str, device: torch.device) -> Merge:
    """The function of that name; arguments are those of ``rows.merge``.

    Raises:
        UserError: There is none of that name, or Triton is not there.
    """
    one_of("merge", name, MERGES)
    if name == "torch":
        return merge
    if find_spec("triton") is None:
        raise UserError("merge=triton is asked for and Triton is not installed", hint="use merge=torch")
    # Triton's own switch: its kernels are then run by Python, for tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"merge=triton is for CUDA, and the tensors are on {device.type}", hint="use merge=torch"
        )
    from megaplug.layers.attention.kernels.triton_merge import merge_fused

    return merge_fused
