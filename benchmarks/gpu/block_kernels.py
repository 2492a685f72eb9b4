"""Every kernel of blocks, and dilated attention on all of them, against the same written out in fp64.

The backward pass gets the output and log-sum-exp of a larger softmax, as it does in ring and dilated
attention. The error is the largest absolute difference over the largest reference value, of each tensor.
Tolerances: fp32 1e-4 (the kernel multiplies in three parts of TF32), bf16 and fp16 as of
``attention_kernels.py``.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import torch
from setting import Setting, ended, read_setting, skipped

from megaplug.errors import UserError
from megaplug.layers.attention import dilated_attention
from megaplug.layers.attention.block_kernels import KERNELS, choose_kernel
from megaplug.layers.attention.kernels.interface import Block, BlockKernel
from megaplug.layers.attention.kernels.reference import Reference

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ON_CUDA = {
    "cuda_flash": (torch.bfloat16, torch.float16),
    "cudnn": (torch.bfloat16, torch.float16),
    "efficient": (torch.bfloat16, torch.float32),
    "flash_attn2": (torch.bfloat16,),
    "flash_attn3": (torch.bfloat16,),
    "flash_attn4": (torch.bfloat16,),
}
ON_CPU = {"cpu_flash": (torch.bfloat16, torch.float32)}
# Query heads and groups; then queries, keys and whether causal: also numbers that no tile divides.
HEADS = ((8, 8), (8, 2))
BLOCKS = ((1024, 1024, True), (1024, 512, False), (1000, 1000, True), (200, 72, False))
PATTERN = ((256, 1024, 4096), (1, 2, 8))


def block(
    dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int, bool], setting: Setting
) -> Block:
    """Rows of two sequences, every other one of a larger tensor, as dilation takes them."""
    queries, keys, causal = sizes
    if setting.rehearse:
        queries, keys = queries // 8, keys // 8
    dim = 32 if setting.rehearse else 128
    options: dict[str, Any] = {"device": setting.device, "dtype": dtype}
    torch.manual_seed(0)
    q = torch.randn(2, queries, 2, heads[0], dim, **options)[:, :, 1]
    k, v = (torch.randn(2, keys, 2, heads[1], dim, **options)[:, :, 1] for _ in range(2))
    return Block(q, k, v, causal, dim**-0.5)


def parts_of(
    kernel: BlockKernel, given: Block, whole: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Output, log-sum-exp, and gradients as of a part of a larger softmax.

    That is made from ``whole``, the output and log-sum-exp of the block; None takes the kernel's own.
    """
    out, lse = kernel.forward(given)
    whole_out, whole_lse = (out * 0.5, lse + 0.7) if whole is None else (whole[0] * 0.5, whole[1] + 0.7)
    d_out = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(given.q.dtype)
    lse_dtype = torch.float64 if given.q.dtype == torch.float64 else torch.float32
    grads = kernel.backward(given, d_out, whole_out.to(given.q.dtype), whole_lse.to(lse_dtype))
    return [out, lse, *grads]


def wide(given: Block) -> Block:
    """The same in fp64."""
    return Block(given.q.double(), given.k.double(), given.v.double(), given.causal, given.scale)


def largest_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of all tensors, each over its own largest value."""
    pairs = zip(found, wanted, strict=True)
    return max(((a.double() - b.to(a.device)).abs().max() / b.abs().max()).item() for a, b in pairs)


def dilated(
    name: str, dtype: torch.dtype, heads: tuple[int, int], setting: Setting, merge: str = "torch"
) -> float:
    """The error of dilated attention over one sequence, against the CPU in fp64."""
    tokens, dim = (512, 16) if setting.rehearse else (4096 + 100, 128)
    torch.manual_seed(0)
    shapes = ((1, tokens, count, dim) for count in (heads[0], heads[1], heads[1], heads[0]))
    # Rounded first, so that both begin with the same numbers.
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]

    def results(device: str, kind: torch.dtype, kernel: str, merge: str = "torch") -> list[torch.Tensor]:
        q, k, v, grad = (x.to(device, kind) for x in tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*leaves, *PATTERN, kernel=kernel, merge=merge)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return largest_error(results(setting.device, dtype, name, merge), results("cpu", torch.float64, "auto"))


def main() -> int:
    """Try every combination, print and store."""
    setting = read_setting(__doc__)
    rows: dict[str, Any] = {}
    failures = []

    def keep(name: str, error: float, tolerance: float) -> None:
        rows[name] = {"error": error, "tolerance": tolerance}
        print(f"{name}: {error:.1e}, tolerance {tolerance:.0e}", flush=True)
        if not error < tolerance:
            failures.append(f"{name}: error {error:.1e}, tolerance {tolerance:.0e}")

    kernels = ON_CPU if setting.rehearse else ON_CUDA
    for name, dtypes in kernels.items():
        try:
            kernel = choose_kernel(torch.device(setting.device), dtypes[0], name)
        except UserError as error:
            skipped(name, error.message)
            continue
        for dtype, heads in product(dtypes, HEADS):
            kind = f"{name} {str(dtype).removeprefix('torch.')} {heads[0]}/{heads[1]}"
            try:
                for sizes in BLOCKS:
                    given = block(dtype, heads, sizes, setting)
                    wanted = parts_of(Reference(), wide(given))
                    found = parts_of(kernel, given, wanted)
                    words = f"{sizes[0]} x {sizes[1]}{' causal' if sizes[2] else ''}"
                    keep(f"{kind} {words}", largest_error(found, wanted), TOLERANCES[dtype])
                keep(f"{kind} dilated", dilated(name, dtype, heads, setting), TOLERANCES[dtype])
            except RuntimeError as error:
                # Another kernel may still work, and its figures are wanted.
                rows[kind] = {"failed": str(error)}
                failures.append(f"{kind}: {error}")
        setting.write("block_kernels", {"what": __doc__, "results": rows})
    for dtype in TOLERANCES if not setting.rehearse else ():
        error = dilated("auto", dtype, HEADS[1], setting, "triton")
        keep(f"auto {dtype} dilated, merged by Triton", error, TOLERANCES[dtype])
    device = torch.device(setting.device)
    chosen = {str(d): choose_kernel(device, d).name for d in (torch.float32, torch.bfloat16, torch.float16)}
    print(f"auto: {chosen}", flush=True)
    setting.write("block_kernels", {"what": __doc__, "auto": chosen, "known": list(KERNELS), "results": rows})
    return ended(failures)


if __name__ == "__main__":
    sys.exit(main())
