"""Dilated attention against dense attention and against torchscale's way of computing it, in one run.

    python benchmarks/dilated_attention.py [--seq-length 16384] [--dtype fp32] [--json FILE] [--help]

Forward and backward, causal, in turns. On a CPU the time is the process's own (one thread), so that what else
runs on the machine counts less; on CUDA it is the wall's. The FLOP bound is how much less there is to compute
than in dense attention, N / sum(w / r^2); the efficiency is the speed-up over torch's SDPA as a share of it.
That counts a pair once for each branch that has it; on a CPU ours computes it once where branches nest.

torchscale's way is written here from a description of its dilated_attention.py: each branch is gathered,
computed, and put back into a whole tensor of zeros; the whole tensors are mixed by the softmax of their
log-sum-exps, which gets no gradient. It is on the same kernel as ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import alternate, environment, median
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from megaplug.layers.attention.block_kernels import choose_kernel
from megaplug.layers.attention.dilated import dilated_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sdpa(q: Tensor, k: Tensor, v: Tensor, options: argparse.Namespace) -> Tensor:
    """Every token with all before it, in torch's fused kernel."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=options.heads != options.kv_heads
    )
    return out.transpose(1, 2)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, options: argparse.Namespace) -> Tensor:
    """The same in torch's own FlashAttention, where torch would take another kernel."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return sdpa(q, k, v, options)


def ours(q: Tensor, k: Tensor, v: Tensor, options: argparse.Namespace) -> Tensor:
    """One joint softmax, exact gradients."""
    return dilated_attention(q, k, v, options.segments, options.rates)


def ours_flash(q: Tensor, k: Tensor, v: Tensor, options: argparse.Namespace) -> Tensor:
    """The same in torch's own FlashAttention."""
    kernel = "cuda_flash" if q.is_cuda else "cpu_flash"
    return dilated_attention(q, k, v, options.segments, options.rates, kernel=kernel)


def ours_triton(q: Tensor, k: Tensor, v: Tensor, options: argparse.Namespace) -> Tensor:
    """The kernel that is chosen, its blocks put together by Triton."""
    return dilated_attention(q, k, v, options.segments, options.rates, merge="triton")


def as_torchscale(q: Tensor, k: Tensor, v: Tensor, options: argparse.Namespace) -> Tensor:
    """Whole tensors for every branch, mixed without a gradient; as many key-value heads as query heads."""
    outs, lses = [], []
    for length, rate in zip(options.segments, options.rates, strict=True):
        sparse = (gathered(x, length, rate).transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*sparse, 0.0, True)
        outs.append(scattered(out.transpose(1, 2), q.shape, length, rate))
        dense = scattered(lse.detach().transpose(1, 2)[..., None], (*q.shape[:3], 1), length, rate)
        lses.append(dense.masked_fill(dense == 0, -1e8))
    with torch.no_grad():
        mixing = torch.stack(lses).softmax(0).to(q.dtype)
    return sum((out * weight for out, weight in zip(outs, mixing, strict=True)), torch.zeros_like(q))


def gathered(x: Tensor, length: int, rate: int) -> Tensor:
    """``[B n, w / r, H, D]``: each block of H / r heads has an offset of its own."""
    blocks = x.unflatten(1, (-1, length // rate, rate)).flatten(0, 1).unflatten(3, (rate, -1))
    return blocks.diagonal(dim1=2, dim2=3).permute(0, 1, 4, 2, 3).flatten(2, 3).contiguous()


def scattered(x: Tensor, shape: Any, length: int, rate: int) -> Tensor:
    """Back to ``[B, N, H, D]``, zeros where the branch has no row."""
    blocks = x.unflatten(2, (rate, -1)).permute(0, 1, 3, 4, 2)
    whole = torch.diag_embed(blocks, dim1=2, dim2=3)
    return whole.flatten(3, 4).flatten(1, 2).reshape(shape)


CONTENDERS = {
    "sdpa": sdpa,
    "sdpa flash": sdpa_flash,
    "ours": ours,
    "ours flash": ours_flash,
    "ours triton": ours_triton,
    "torchscale's way": as_torchscale,
}
ON_CPU = ("sdpa", "ours", "torchscale's way")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times, speed-ups and the share of the bound."""
    torch.manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    shapes = ((1, options.seq_length, count, options.head_dim) for count in heads)
    *inputs, grad = (
        torch.randn(shape, device=options.device, dtype=DTYPES[options.dtype]) for shape in shapes
    )
    inputs = [x.requires_grad_() for x in inputs]

    def forward_and_backward(name: str) -> list[Tensor]:
        out = CONTENDERS[name](*inputs, options)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    names = [name for name in CONTENDERS if name in options.only]
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    runs = {name: lambda name=name: forward_and_backward(name) for name in names}
    seconds = alternate(runs, options.repeats, options.device, clock)
    bound = options.seq_length / sum(w / r**2 for w, r in zip(options.segments, options.rates, strict=True))
    rows: dict[str, dict[str, Any]] = {name: {"seconds": times} for name, times in seconds.items()}
    for row in rows.values():
        row["median_s"] = median(row["seconds"])
        row["speed_up"] = median(seconds["sdpa"]) / row["median_s"]
        row["of_bound"] = row["speed_up"] / bound
    sizes = {key: value for key, value in vars(options).items() if key not in ("json", "only", "repeats")}
    return {
        "what": "core attention, causal, forward and backward; measured; "
        + ("wall time" if options.device == "cuda" else "CPU time of one thread"),
        "sizes": sizes,
        "kernel": choose_kernel(torch.device(options.device), DTYPES[options.dtype]).name,
        "machine": environment(options.device),
        "flop_bound": bound,
        "results": rows,
    }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    machine, sizes = report["machine"], report["sizes"]
    print(
        f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, {report['kernel']}, {sizes['dtype']}"
    )
    pattern = f"{sizes['segments']} x {sizes['rates']}"
    print(f"{sizes['seq_length']:,} tokens, {pattern}: bound {report['flop_bound']:.2f}")
    print(f"{'':18} {'median s':>9} {'fastest s':>9} {'speed-up':>9} {'of bound':>9}")
    for name, row in report["results"].items():
        times = f"{row['median_s']:9.2f} {min(row['seconds']):9.2f}"
        print(f"{name:18} {times} {row['speed_up']:9.2f} {row['of_bound']:9.2f}")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, default=16384)
    parser.add_argument("--segments", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--rates", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--only", nargs="+", default=ON_CPU, choices=CONTENDERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
