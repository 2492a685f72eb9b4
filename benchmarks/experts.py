"""Grouped experts against Megatron's SequentialMLP: forward and backward, in turns, in one run.

    python benchmarks/experts.py [--json FILE]
    python benchmarks/experts.py --device cuda --tokens 16384 --hidden 2048 --width 1024 --experts 64

SwiGLU; a uniform router sends each token to one or two experts. ``training`` is as in a training step: all
are wrapped in Megatron's DistributedDataParallel, which sums gradients in its buffer. ``alone`` leaves the
gradients in the parameters. Transformer Engine's grouped MLP stands beside them on CUDA where it is
installed. On a CPU all cores are used, in the environment that our launcher gives a rank; ``--threads 1``
counts the process's own seconds, which another process on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import alternate, environment, median
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Sizes:
    """Of one case: ``topk`` copies of each token, of ``hidden`` elements, over experts of ``width``."""

    device: str
    tokens: int
    hidden: int
    width: int
    experts: int
    topk: int

    @property
    def rows(self) -> int:
        """Copies of tokens."""
        return self.tokens * self.topk

    @property
    def flops(self) -> int:
        """Of the matrix products, forward and backward: three of each, a multiply-add counts two."""
        return 3 * 2 * self.rows * self.hidden * 3 * self.width


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TE = "Transformer Engine"


def kinds(device: str) -> tuple[str, ...]:
    """What is compared: ours first."""
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        return ("grouped", "sequential", TE)
    return ("grouped", "sequential")


def build(kind: str, sizes: Sizes, dtype: torch.dtype, in_training: bool) -> Any:
    """Experts of that kind on one rank, with the same weights for ours and Megatron's."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaplug.layers.backend import experts_builder, native_provider
    from megaplug.layers.registry import ExpertsChoice

    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=4,
        num_moe_experts=sizes.experts,
        moe_ffn_hidden_size=sizes.width,
        ffn_hidden_size=sizes.width,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        use_cpu_initialization=sizes.device == "cpu",
        moe_grouped_gemm=kind == TE,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    torch.manual_seed(0)
    if kind == TE:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        make = TESpecProvider().grouped_mlp_modules(True)
    else:
        provider = native_provider("flash", {}, "RMSNorm", experts=experts_builder(ExpertsChoice(kind)))
        make = provider.grouped_mlp_modules(False)
    experts = make(sizes.experts, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    experts = experts.to(sizes.device)
    if not in_training:
        return experts
    sums = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    return DistributedDataParallel(config, sums, experts)


def contender(experts: Any, counts: torch.Tensor, given: list[torch.Tensor]) -> Callable[[], None]:
    """One forward and backward pass."""
    x, probs, grad = given

    def run() -> None:
        leaves = [x.detach().requires_grad_(), probs.detach().requires_grad_()]
        out, _ = experts(leaves[0], counts, leaves[1])
        out.backward(grad)

    return run


def forget(experts: Any) -> None:
    """Make room for the next gradients."""
    if hasattr(experts, "zero_grad_buffer"):
        experts.zero_grad_buffer()
    else:
        for weight in experts.parameters():
            weight.grad = None


def case(
    sizes: Sizes, dtype: torch.dtype, in_training: bool, repeats: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """One row: median seconds, TFLOP/s and the ratio to what Megatron has."""
    chance = torch.Generator().manual_seed(1)
    counts = torch.randint(sizes.experts, (sizes.rows,), generator=chance).bincount(minlength=sizes.experts)
    x, grad = (
        torch.randn(sizes.rows, sizes.hidden, generator=chance).to(sizes.device, dtype) for _ in range(2)
    )
    given = [x, torch.rand(sizes.rows, generator=chance).to(sizes.device), grad]
    both = {kind: build(kind, sizes, dtype, in_training) for kind in kinds(sizes.device)}
    runs = {kind: contender(experts, counts, given) for kind, experts in both.items()}
    seconds = alternate(runs, repeats, sizes.device, clock, before=lambda kind: forget(both[kind]))
    row: dict[str, Any] = {kind: median(values) for kind, values in seconds.items()}
    row["tflops"] = {kind: sizes.flops / median(values) / 1e12 for kind, values in seconds.items()}
    pairs = zip(seconds["sequential"], seconds["grouped"], strict=True)
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    row |= {"sequential_over_grouped": median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
    if TE in seconds:
        row["te_over_grouped"] = row[TE] / row["grouped"]
    return row


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A row of each case, printed as it comes."""
    results: dict[str, Any] = {}
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    cases = itertools.product(("training", "alone"), options.dtypes, options.experts, options.topk)
    for setting, dtype, num_experts, topk in cases:
        sizes = Sizes(options.device, options.tokens, options.hidden, options.width, num_experts, topk)
        row = case(sizes, DTYPES[dtype], setting == "training", options.repeats, clock)
        key = f"{setting}, {dtype}, {num_experts} experts, top {topk}"
        results[key] = row
        print(
            f"{key:36} {row['grouped'] * 1e3:8.1f} ms  {row['tflops']['grouped']:8.3f} TFLOP/s  "
            f"{row['sequential_over_grouped']:5.2f}x"
            + (f"  {TE} {row['te_over_grouped']:5.2f}x" if "te_over_grouped" in row else ""),
            flush=True,
        )
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--topk", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from megaplug.launchers.heap import keeping_freed_memory

    if options.device == "cpu" and (words := keeping_freed_memory(os.environ)):
        # Read once, when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | words)
    torch.set_num_threads(options.threads)
    options.clock = "cpu" if options.device == "cpu" and options.threads == 1 else "wall"
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megaplug.runtime import cpu

    if options.device == "cpu":
        cpu.install()
    elif TE not in kinds("cuda"):
        print(f"SKIPPED {TE}: it is not installed", flush=True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    results = measure(options)
    torch.distributed.destroy_process_group()
    if options.json:
        clock = {"clock": options.clock, "threads": options.threads}
        content = {
            "what": "experts, forward and backward; median seconds, measured in turns",
            "machine": environment(options.device) | clock,
            "sizes": {name: getattr(options, name) for name in ("tokens", "hidden", "width")},
            "results": results,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
