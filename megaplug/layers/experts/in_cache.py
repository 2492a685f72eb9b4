"""SwiGLU experts on a CPU: both linear layers and what is between them, of one expert at a time.

What an expert needs for a moment stays in the processor's cache, and is no new tensor for all rows. Each
thread has an expert of its own (``threads.py``).

Shape letters: T rows of all experts, the first expert's first, H hidden size, E experts, F their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megaplug.layers.experts.computing import computing_dtype
from megaplug.layers.experts.gradient_place import GradientPlace
from megaplug.layers.experts.threads import for_all_experts


def swiglu_experts(
    x_TH: Tensor, probs_T: Tensor, fc1_EGH: Tensor, fc2_EHF: Tensor, counts: tuple[int, ...]
) -> Tensor:
    """``fc2(p silu(gate) up)`` with ``gate, up = fc1(x)``, of every row by its expert.

    Kept for the backward pass are x, the probabilities, and gate and up.

    Args:
        x_TH: The rows; any strides.
        probs_T: By what each row's activation is multiplied.
        fc1_EGH: ``[E, 2 F, H]``, the gate's rows before those of up.
        fc2_EHF: Of the second layer.
        counts: Rows of each expert, which sum to T.

    Returns:
        ``[T, H]`` in the dtype of x. What is between the two layers is in fp32 where x is narrower.
    """
    return _SwiGLUExperts.apply(x_TH, probs_T, fc1_EGH, fc2_EHF, counts)


class _SwiGLUExperts(torch.autograd.Function):
    """With ``s = silu(gate)`` and ``h = p s up``: d_p is the sum of d_h s up.

    ``d_up = p d_h s`` and ``d_gate = p d_h up silu'(gate)``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        wide, out = x.new_empty(x.size(0), fc1.size(1)), x.new_empty(x.size(0), fc2.size(1))
        product = _product_of(x)
        of_experts = _of_experts(counts, (x, probs.unsqueeze(-1), wide, out), (fc1, fc2))

        def compute(experts: Iterator[int]) -> None:
            scratch = _Scratch(counts, _between(x), fc1.size(1), fc2.size(2), fc2.size(1))
            for expert in experts:
                x_e, p_e, wide_e, out_e, first, second = of_experts[expert]
                if not x_e.size(0):
                    continue
                both, hidden, last = scratch.of(x_e.size(0))
                gate, up = product(x_e, first.t(), wide_e, both).chunk(2, -1)
                torch.ops.aten.silu.out(gate, out=hidden).mul_(up).mul_(p_e)
                product(hidden, second.t(), out_e, last)

        for_all_experts(counts, compute)
        ctx.save_for_backward(x, probs, wide, fc1, fc2)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, probs, wide, fc1, fc2 = ctx.saved_tensors
        (d_out,) = grads
        d_x, d_probs = torch.empty_like(x), torch.empty_like(probs, dtype=_between(x))
        of_first, of_second = (
            GradientPlace(weight, is_wanted)
            for weight, is_wanted in zip((fc1, fc2), ctx.needs_input_grad[2:4], strict=True)
        )
        dtype = computing_dtype(x)
        is_narrow, width = _is_narrow(x), fc2.size(2)
        product = _product_of(x)
        tensors = (x, probs.unsqueeze(-1), wide, d_out, d_x, d_probs)
        of_experts = _of_experts(ctx.counts, tensors, (fc1, fc2))

        def compute(experts: Iterator[int]) -> None:
            scratch = _Scratch(ctx.counts, _between(x), width, width, width, 2 * width, x.size(1))
            for expert in experts:
                x_e, p_e, wide_e, d_out_e, d_x_e, d_p_e, first, second = of_experts[expert]
                if not x_e.size(0):
                    of_first.put_none(expert)
                    of_second.put_none(expert)
                    continue
                s, d_hidden, hidden, d_wide, d_in = scratch.of(x_e.size(0))
                if is_narrow:
                    x_e, d_out_e, wide_e = x_e.to(dtype), d_out_e.to(dtype), wide_e.to(s.dtype)
                gate, up = wide_e.chunk(2, -1)
                d_gate, d_up = d_wide.chunk(2, -1)
                product(d_out_e, second, d_hidden, d_hidden)
                torch.ops.aten.silu.out(gate, out=s)
                torch.mul(s, up, out=hidden)
                torch.sum(torch.mul(d_hidden, hidden, out=d_up), -1, out=d_p_e)  # d_up only lends its memory
                of_second.put(expert, d_out_e.t(), hidden.mul_(p_e).to(dtype))
                d_hidden.mul_(p_e)
                torch.mul(d_hidden, s, out=d_up)
                torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
                d_wide = d_wide.to(dtype)
                of_first.put(expert, d_wide.t(), x_e)
                product(d_wide, first, d_x_e, d_in)

        for_all_experts(ctx.counts, compute)
        return d_x, d_probs.to(probs.dtype), of_first.gradient(), of_second.gradient(), None


def _of_experts(
    counts: Sequence[int], rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Each expert's rows of every tensor, and its matrices."""
    parts = [*(each.split(counts) for each in rows), *(each.unbind() for each in weights)]
    return list(zip(*parts, strict=True))


class _Scratch:
    """A thread's memory for the rows of one expert, the same for each.

    Args:
        counts: Rows of each expert.
        dtype: Of all.
        widths: Elements of a row, of each tensor.
    """

    def __init__(self, counts: tuple[int, ...], dtype: torch.dtype, *widths: int) -> None:
        most = max(counts, default=0)
        self._tensors = [torch.empty(most, width, dtype=dtype) for width in widths]

    def of(self, rows: int) -> Iterator[Tensor]:
        """The first rows of each tensor; what they hold is what was left there."""
        return (tensor[:rows] for tensor in self._tensors)


def _between(x: Tensor) -> torch.dtype:
    """Of what is between the two linear layers."""
    return torch.promote_types(x.dtype, torch.float32)


def _is_narrow(x: Tensor) -> bool:
    return x.dtype != _between(x)


def _product_of(x: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What is called for every expert, with all that can be decided before decided.

    It takes rows, a matrix, where the product is written to, and memory that it may use; it gives the product
    as it was rounded there, in the dtype of that memory.
    """
    if not _is_narrow(x):
        return lambda rows, matrix, out, scratch: torch.mm(rows, matrix, out=out)
    dtype = computing_dtype(x)
    is_wide = dtype == _between(x)

    def product(rows: Tensor, matrix: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        out.copy_(torch.mm(rows.to(dtype), matrix.to(dtype), out=scratch if is_wide else None))
        return scratch.copy_(out)

    return product
