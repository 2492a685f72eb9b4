"""Attention of one block of rows, with the log-sum-exp of its scores, behind one interface.

Shape letters: B sequences, S queries, T keys, H query heads, G key-value heads, D elements a head.

The backward pass takes the output and log-sum-exp of the *whole* softmax that the block is a part of. Of
score s of query i: ``p = exp(s - lse_i)``, ``ds = p (do_i v^T - do_i . out_i)``; both are right for a part
as they stand, so the kernels that there are need no change.

Causal blocks are squares here (S = T), so that it never matters from which corner a kernel's triangle
starts; and no block is empty: torch's CPU kernel divides by its number of keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaplug.layers.attention.calls import Repeats


@dataclass(frozen=True)
class Block:
    """Queries against keys.

    Attributes:
        q: ``[B, S, H, D]``.
        k: ``[B, T, G, D]``; H is a multiple of G.
        v: As k.
        causal: Whether a query reads the keys up to its own number; else it reads all.
        scale: Factor on the scores.
        repeats: How often pairs count, as ``log M`` on the score of one that counts M times; None for once.
            For kernels that weigh pairs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float
    repeats: Repeats | None = None


class BlockKernel(ABC):
    """A kernel.

    Attributes:
        name: As it is logged.
        most_elements: How many elements of queries a call of several sequences should have at most; None
            for any number.
        wide_gradients: Whether gradients of bf16 and fp16 may come in fp32, which other ranks should then
            get.
    """

    name: str
    wide_gradients = False
    most_elements: int | None = None

    def most_weighed(self, dtype: torch.dtype) -> int:
        """How many pairs a block with repeats may have for one head; 0 where it takes none in that dtype."""
        return 0

    @abstractmethod
    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """The output ``[B, S, H, D]`` and the natural log-sum-exp ``[B, S, H]``, fp32 or fp64."""

    @abstractmethod
    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, given the output and log-sum-exp of the whole softmax."""


def by_head(*tensors: Tensor) -> Any:
    """Rows and heads exchanged, as torch's kernels have them; views."""
    return tuple(x.transpose(1, 2) for x in tensors)
