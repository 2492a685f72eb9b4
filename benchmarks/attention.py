"""Native flash attention against Megatron's local DotProductAttention, in one run.

    python benchmarks/attention.py [--seq-length 2048] [--head-dim 32] [--json FILE] [--help]

Times are medians of alternating forward and backward passes. Peak memory is what one forward and
backward takes beyond its inputs: on a CPU the resident high-water mark of a fresh process for each
contender, after a small warm-up; on CUDA the allocator's. Errors are against attention in fp64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from measure import alternate, environment, median, peak_bytes
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
WARM_UP = 64  # tokens

warnings.filterwarnings("ignore")


def make_inputs(options: argparse.Namespace, seq_length: int) -> tuple[list[Tensor], Tensor]:
    """Query ``[S, B, H, D]``, key and value ``[S, B, G, D]``, and the output's gradient ``[S, B, H D]``."""
    torch.manual_seed(0)
    device, dtype, batch, dim = options.device, DTYPES[options.dtype], options.batch_size, options.head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(seq_length, batch, *shape, device=device, dtype=dtype)

    leaves = [
        random(heads, dim).requires_grad_() for heads in (options.heads, options.kv_heads, options.kv_heads)
    ]
    return leaves, random(options.heads * dim)


def make_contender(name: str, options: argparse.Namespace) -> Callable[..., Tensor]:
    """A function of query, key and value."""
    if name == "sdpa":
        return sdpa
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaplug.layers.attention.flash import FlashAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.heads * options.head_dim,
        num_attention_heads=options.heads,
        num_query_groups=options.kv_heads,
        attention_dropout=0.0,
        bf16=options.dtype == "bf16",
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )
    group = SimpleNamespace(size=lambda: 1)
    kind = {"flash": FlashAttention, "local": DotProductAttention}[name]
    attention = kind(config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(tp=group))
    # The loader would hand Megatron its mask; made here, it costs neither of them anything.
    masks = {
        size: torch.ones(size, size, dtype=torch.bool, device=options.device).triu_(1)
        for size in (WARM_UP, options.seq_length)
    }
    return lambda query, key, value: attention(query, key, value, masks[query.size(0)])


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's attention as a user would call it."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention written out; meant for fp64."""
    key, value = (tensor.repeat_interleave(query.size(2) // key.size(2), dim=2) for tensor in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * query.size(3) ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    probabilities = scores.masked_fill(mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", probabilities, value).flatten(2)


def forward_backward(attention: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    for leaf in leaves:
        leaf.grad = None
    out = attention(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest absolute difference over the output and the three gradients."""
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, wanted, strict=True))


def memory_of(name: str, options: argparse.Namespace) -> int:
    """Bytes that a forward and backward of this contender takes at its peak."""
    attention = make_contender(name, options)
    forward_backward(attention, *make_inputs(options, WARM_UP))
    leaves, grad = make_inputs(options, options.seq_length)
    return peak_bytes(lambda: forward_backward(attention, leaves, grad), options.device)


def memory_in_fresh_process(name: str) -> int:
    """``memory_of`` in a process of its own, with the options of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only-memory", name]
    # Every large tensor is mapped and unmapped on its own, so that freed memory is not counted.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()[-1]
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is written and printed."""
    names = ["flash", "local", "sdpa"]
    leaves, grad = make_inputs(options, options.seq_length)
    contenders = {name: make_contender(name, options) for name in names}
    runs = {
        name: lambda a=attention: forward_backward(a, leaves, grad) for name, attention in contenders.items()
    }
    seconds = alternate(runs, options.repeats, options.device)
    found = {name: [tensor.clone() for tensor in run()] for name, run in runs.items()}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = forward_backward(reference, exact, grad.double())
    results = {
        name: {
            "median_s": median(seconds[name]),
            "fastest_s": min(seconds[name]),
            "peak_bytes": memory_in_fresh_process(name),
            "error_against_fp64": largest_error(found[name], wanted),
        }
        for name in names
    }
    flash, local = results["flash"], results["local"]
    return {
        "what": "core attention, causal, forward and backward; measured",
        "sizes": {key: value for key, value in vars(options).items() if key not in ("json", "only_memory")},
        "machine": environment(options.device),
        "results": results,
        "local_over_flash": {
            "time": local["median_s"] / flash["median_s"],
            "memory": local["peak_bytes"] / flash["peak_bytes"],
        },
        "flash_minus_local": largest_error(found["flash"], found["local"]),
    }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    machine, ratio = report["machine"], report["local_over_flash"]
    print(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    print(f"{'':8} {'median ms':>10} {'fastest ms':>10} {'peak MiB':>10} {'error vs fp64':>14}")
    for name, row in report["results"].items():
        times = f"{row['median_s'] * 1e3:10.1f} {row['fastest_s'] * 1e3:10.1f}"
        print(f"{name:8} {times} {row['peak_bytes'] / MIB:10.1f} {row['error_against_fp64']:14.1e}")
    print(f"flash is {ratio['time']:.1f}x faster than local and takes {ratio['memory']:.1f}x less memory;")
    print(f"their largest difference is {report['flash_minus_local']:.1e}")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with megatron_without_groups(options.device):
        if options.only_memory:
            print(memory_of(options.only_memory, options))
            return
        report = measure(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def megatron_without_groups(device: str) -> Any:
    """What the local attention asks of a set-up Megatron: a device, a buffer, and a seed (dropout is 0)."""
    from contextlib import ExitStack

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.utils import GlobalMemoryBuffer

    stack = ExitStack()
    stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: device))
    stack.enter_context(mock.patch.object(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer()))
    stack.enter_context(mock.patch.object(random.get_cuda_rng_tracker(), "fork", nullcontext))
    return stack


if __name__ == "__main__":
    main()
