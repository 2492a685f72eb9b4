"""One linear layer for each group of rows, the rows of a group one after another.

Shape letters: T rows of all groups, E groups, K elements that come in, N that go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.experts.computing import computing_dtype
from megaplug.layers.experts.gradient_place import GradientPlace

KERNELS = ("auto", "grouped_mm", "loop")
# Of a row, so that each begins where torch's grouped_mm wants it to on CUDA.
_ALIGNMENT_BYTES = 16


def grouped_linear(x_TK: Tensor, weight_ENK: Tensor, counts: Sequence[int], kernel: str = "auto") -> Tensor:
    """``x_e @ weight_e.T`` for the rows of every group e.

    Args:
        x_TK: The rows, those of group 0 first; any strides.
        weight_ENK: As ``torch.nn.Linear`` has them.
        counts: Rows of each group; 0 is one of them, and their sum is T.
        kernel: ``grouped_mm``, torch's; ``loop``, a matrix product for each group; ``auto`` chooses.

    Returns:
        ``[T, N]`` in the dtype of x.

    Raises:
        UserError: The counts do not fit, or there is no such kernel.
    """
    if len(counts) != weight_ENK.size(0) or sum(counts) != x_TK.size(0) or x_TK.size(1) != weight_ENK.size(2):
        raise UserError(
            f"{x_TK.size(0)} rows of {x_TK.size(1)} in groups of {list(counts)}, "
            f"and weights of {tuple(weight_ENK.shape)}",
            hint="[T, K], E counts that sum to T, and [E, N, K]",
        )
    return _GroupedLinear.apply(x_TK, weight_ENK, tuple(counts), choose_kernel(x_TK, weight_ENK, kernel))


def choose_kernel(x_TK: Tensor, weight_ENK: Tensor, kernel: str = "auto") -> str:
    """``grouped_mm`` or ``loop``, the faster of both where nobody says which.

    On a CPU a loop is never slower: torch's grouped_mm is a loop there too, which copies besides (0.65x to
    1.0x of it was seen). On CUDA grouped_mm is one launch for all groups, in bf16 from Ampere on.

    Raises:
        UserError: There is none of that name.
    """
    if kernel not in KERNELS:
        raise UserError(f"there is no kernel {kernel!r} of grouped linear layers", hint=", ".join(KERNELS))
    if kernel != "auto":
        return kernel
    fits = (
        x_TK.is_cuda
        and x_TK.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x_TK.device) >= (8, 0)
    )
    aligned = all(size * x_TK.element_size() % _ALIGNMENT_BYTES == 0 for size in weight_ENK.shape[1:])
    return "grouped_mm" if fits and aligned else "loop"


class _GroupedLinear(torch.autograd.Function):
    """Gradients of all groups are written where they belong: nothing is stacked or joined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...], kernel: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.kernel = counts, kernel
        return products(x, weight.transpose(1, 2), counts, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        (d_out,) = grads
        d_x = products(d_out, weight, ctx.counts, ctx.kernel) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[1]
        return d_x, weight_gradient(weight, d_out, x, ctx.counts, ctx.kernel) if wanted else None, None, None


def weight_gradient(
    weight: Tensor, d_out: Tensor, x: Tensor, counts: tuple[int, ...], kernel: str
) -> Tensor | None:
    """The gradient of ``[E, N, K]``, as a backward pass of autograd returns it.

    Args:
        weight: The parameter.
        d_out: ``[T, N]``.
        x: ``[T, K]``.
        counts: Rows of each group.
        kernel: ``grouped_mm``, or ``loop``, which knows Megatron's buffer: see `GradientPlace`.
    """
    if kernel == "grouped_mm":
        return torch.nn.functional.grouped_mm(d_out.t(), x, offs=_ends(counts, x.device))
    place = GradientPlace(weight)
    d_out, x = (each.to(computing_dtype(each)) for each in (d_out, x))
    for group, (d_rows, rows) in enumerate(zip(d_out.t().split(counts, 1), x.split(counts), strict=True)):
        place.put(group, d_rows, rows)
    return place.gradient()


def products(x: Tensor, matrices: Tensor, counts: tuple[int, ...], kernel: str) -> Tensor:
    """``[T, N]`` of ``[T, K]`` and ``[E, K, N]``."""
    if kernel == "grouped_mm":
        return torch.nn.functional.grouped_mm(x, matrices, offs=_ends(counts, x.device))
    out = x.new_empty(x.size(0), matrices.size(2))
    rows = x.to(computing_dtype(x))
    # Splitting all at once is several times as fast as slicing for each group.
    for of_group, matrix, answer in zip(
        rows.split(counts), matrices.unbind(), out.split(counts), strict=True
    ):
        if not of_group.size(0):
            continue
        if rows.dtype == x.dtype:
            torch.mm(of_group, matrix, out=answer)
        else:
            answer.copy_(of_group @ matrix.to(rows.dtype))
    return out


def _ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each group ends, as grouped_mm takes it."""
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
