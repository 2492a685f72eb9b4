"""Flash attention with each ``cuda_kernel`` against torch's attention in fp64.

The error is the largest absolute difference over output and gradients, over the largest reference value of
each. Tolerances: fp32 1e-4 (the kernel multiplies in three parts of TF32), fp16 1e-2, bf16 5e-2 (11 and 8
bits, and sums over the whole sequence). Under ``use_deterministic_algorithms`` two runs have to agree bit
for bit.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from itertools import product
from typing import Any

from setting import Setting, ended, read_setting

# Read by cuBLAS once: the reference is computed under deterministic algorithms, too.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaplug.errors import UserError
from megaplug.layers.attention.flash import fused_attention

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Query heads and groups.
HEADS = ((8, 8), (8, 2), (8, 1))
KERNELS = ("auto", "flash", "cudnn", "efficient")


@dataclass(frozen=True)
class Case:
    """One combination."""

    kernel: str
    dtype: torch.dtype
    heads: int
    groups: int
    deterministic: bool

    @property
    def name(self) -> str:
        """As it is printed."""
        mode = " deterministic" if self.deterministic else ""
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} {self.heads}/{self.groups}{mode}"

    @property
    def refusal(self) -> str:
        """Why torch has no such kernel; empty where it has."""
        if self.kernel in ("flash", "cudnn") and self.dtype is torch.float32:
            return "torch's flash and cuDNN kernels have no fp32"
        if self.kernel == "cudnn" and self.deterministic:
            return "cuDNN's backward pass is not deterministic"
        return ""


def run(case: Case, setting: Setting) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values."""
    tensors, grad = inputs(case, setting)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = fused_attention(*leaves, causal=True, scale=leaves[0].size(3) ** -0.5, cuda_kernel=case.kernel)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def inputs(case: Case, setting: Setting) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query ``[S, B, H, D]``, key and value as views of one projection as Megatron's are, and a gradient."""
    seq_length, dim = (64, 16) if setting.rehearse else (1024, 128)
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": setting.device, "dtype": case.dtype}
    q = torch.randn(seq_length, 2, case.heads, dim, **options)
    k, v = torch.randn(seq_length, 2, case.groups, 2 * dim, **options).split(dim, dim=3)
    return [q, k, v], torch.randn(seq_length, 2, case.heads * dim, **options)


def reference(case: Case, setting: Setting) -> list[torch.Tensor]:
    """The same in fp64, scores written out by torch's own kernel."""
    tensors, grad = inputs(case, setting)
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    k, v = (leaf.repeat_interleave(case.heads // case.groups, dim=2) for leaf in leaves[1:])
    q_BHSD, k_BHSD, v_BHSD = (tensor.permute(1, 2, 0, 3) for tensor in (leaves[0], k, v))
    with sdpa_kernel([SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
    out = out.permute(2, 0, 1, 3).flatten(2)
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def largest_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of output and gradients, each over its own largest value."""
    errors = [
        ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)
    ]
    return max(errors)


def judge(case: Case, setting: Setting, wanted: list[torch.Tensor]) -> tuple[dict[str, Any], str]:
    """What came of a case, and what is wrong with it (empty if nothing)."""
    refusal = "" if setting.rehearse else case.refusal
    try:
        found = run(case, setting)
    except UserError as error:
        row = {"refused": error.message}
        return row, "" if refusal else f"{case.name}: {error.message}"
    if refusal:
        return {"ran": True}, f"{case.name} ran, though {refusal}"
    error = largest_error(found, wanted)
    row = {"error": error, "tolerance": TOLERANCES[case.dtype]}
    if not error < TOLERANCES[case.dtype]:
        return row, f"{case.name}: error {error:.1e}, tolerance {TOLERANCES[case.dtype]:.0e}"
    if case.deterministic:
        again = run(case, setting)
        row["repeats_bit_for_bit"] = all(map(torch.equal, found, again))
        if not row["repeats_bit_for_bit"]:
            return row, f"{case.name}: two runs differ"
    return row, ""


def main() -> int:
    """Try every combination, print and store."""
    setting = read_setting(__doc__)
    rows, failures = {}, []
    for dtype, (heads, groups) in product(TOLERANCES, HEADS):
        torch.use_deterministic_algorithms(False)
        wanted = reference(Case("auto", dtype, heads, groups, False), setting)
        for kernel, deterministic in product(KERNELS, (False, True)):
            case = Case(kernel, dtype, heads, groups, deterministic)
            torch.use_deterministic_algorithms(deterministic)
            rows[case.name], failure = judge(case, setting, wanted)
            print(f"{case.name}: {rows[case.name]}", flush=True)
            failures += [failure] if failure else []
    torch.use_deterministic_algorithms(False)
    setting.write("attention_kernels", {"what": __doc__, "results": rows})
    return ended(failures)


if __name__ == "__main__":
    sys.exit(main())
