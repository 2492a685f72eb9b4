"""Where the gradients of the weights of all experts go, one expert after the other.

Shape letters: E experts, t rows of one, N and K elements that go out of its linear layer and that come in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaplug.layers.experts.computing import NARROW, computing_dtype


class GradientPlace:
    """Megatron's buffer where its DDP keeps one (``main_grad``), else a new tensor.

    In the buffer each expert's gradient is added while it is in the cache, in the buffer's dtype; experts
    without rows cost nothing there.

    Args:
        weight_ENK: The parameter.
        is_wanted: Whether it is trained; if not, nothing is computed.
    """

    def __init__(self, weight_ENK: Tensor, is_wanted: bool = True) -> None:
        self._weight: Any = weight_ENK
        self._is_wanted = is_wanted
        self._is_buffer = hasattr(weight_ENK, "grad_added_to_main_grad")
        self._whole: Tensor = self._weight.main_grad if self._is_buffer else torch.empty_like(weight_ENK)
        self._dtype = self._whole.dtype
        # Slicing for each expert takes several times as long.
        self._parts = self._whole.unbind()

    def put(self, expert: int, d_out_Nt: Tensor, x_tK: Tensor) -> None:
        """Take the gradient ``d_out @ x`` of one expert; each is put once."""
        if not self._is_wanted:
            return
        if not x_tK.size(0):
            self.put_none(expert)
            return
        part = self._parts[expert]
        if x_tK.dtype != self._dtype and self._is_summed_wider(x_tK):
            d_out_Nt, x_tK = d_out_Nt.to(self._dtype), x_tK.to(self._dtype)
        if x_tK.dtype != self._dtype:
            product = d_out_Nt @ x_tK
            part.add_(product) if self._is_buffer else part.copy_(product)
        elif self._is_buffer:
            part.addmm_(d_out_Nt, x_tK)
        else:
            torch.mm(d_out_Nt, x_tK, out=part)

    def _is_summed_wider(self, x: Tensor) -> bool:
        """Nothing is rounded to less than the sum, but where narrow numbers are multiplied faster."""
        is_slower = computing_dtype(x) != x.dtype or x.dtype not in NARROW
        return is_slower and self._whole.device.type == "cpu" and self._dtype.itemsize > x.dtype.itemsize

    def put_none(self, expert: int) -> None:
        """Of an expert without rows."""
        if self._is_wanted and not self._is_buffer:
            self._parts[expert].zero_()

    def gradient(self) -> Tensor | None:
        """What the backward pass of autograd returns when all experts have been put."""
        if not self._is_wanted:
            return None
        if not self._is_buffer:
            return self._whole
        self._weight.grad_added_to_main_grad = True
        # It is only looked for: the hook that reduces gradients follows one.
        return torch.empty_like(self._weight)
