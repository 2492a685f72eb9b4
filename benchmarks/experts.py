"""Grouped experts against Megatron's SequentialMLP: forward and backward, in turns, in one run.

    python benchmarks/experts.py [--json FILE]

2,048 tokens, hidden size 256, expert width 512, SwiGLU; a uniform router sends each token to one or two of 16
or 64 experts. ``training`` is as in a training step: both are wrapped in Megatron's DistributedDataParallel,
which sums gradients in its buffer. ``alone`` leaves the gradients in the parameters. The seconds are the
process's own, with one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, median
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")
TOKENS, HIDDEN, WIDTH = 2048, 256, 512
EXPERTS, TOPK = (16, 64), (1, 2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("grouped", "sequential")


def build(kind: str, num_experts: int, dtype: torch.dtype, in_training: bool) -> Any:
    """Experts of that kind on one rank, with the same weights for all kinds."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaplug.layers.backend import experts_builder, native_provider
    from megaplug.layers.registry import ExpertsChoice

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=WIDTH,
        ffn_hidden_size=WIDTH,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    torch.manual_seed(0)
    provider = native_provider("flash", {}, "RMSNorm", experts=experts_builder(ExpertsChoice(kind)))
    make = provider.grouped_mlp_modules(False)
    experts = make(num_experts, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
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
    """Make room for the next gradients, which no time is counted for."""
    if hasattr(experts, "zero_grad_buffer"):
        experts.zero_grad_buffer()
    else:
        for weight in experts.parameters():
            weight.grad = None


def seconds_in_turns(
    both: dict[str, Any], runs: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[float]]:
    """CPU seconds of each, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            forget(both[name])
            start = time.process_time()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def measure(repeats: int) -> dict[str, Any]:
    """Median CPU seconds of each case."""
    results: dict[str, Any] = {}
    cases = itertools.product(("training", "alone"), DTYPES, EXPERTS, TOPK)
    for setting, dtype_name, num_experts, topk in cases:
        dtype, rows = DTYPES[dtype_name], TOKENS * topk
        chance = torch.Generator().manual_seed(1)
        counts = torch.randint(num_experts, (rows,), generator=chance).bincount(minlength=num_experts)
        x, grad = (torch.randn(rows, HIDDEN, generator=chance).to(dtype) for _ in range(2))
        given = [x, torch.rand(rows, generator=chance), grad]
        both = {kind: build(kind, num_experts, dtype, setting == "training") for kind in KINDS}
        runs = {kind: contender(experts, counts, given) for kind, experts in both.items()}
        seconds = seconds_in_turns(both, runs, repeats)
        row: dict[str, float] = {kind: median(values) for kind, values in seconds.items()}
        pairs = zip(seconds["sequential"], seconds["grouped"], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        row["sequential_over_grouped"] = median(ratios)
        key = f"{setting}, {dtype_name}, {num_experts} experts, top {topk}"
        results[key] = row | {"lowest": ratios[0], "highest": ratios[-1]}
        print(f"{key:36} {row['grouped'] * 1e3:8.1f} ms   {row['sequential_over_grouped']:5.2f}x", flush=True)
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from megaplug.runtime import cpu

    cpu.install()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    results = measure(options.repeats)
    torch.distributed.destroy_process_group()
    if options.json:
        content = {
            "what": "experts, forward and backward; median CPU seconds, measured in turns",
            "machine": environment("cpu") | {"clock": "cpu"},
            "sizes": {"tokens": TOKENS, "hidden": HIDDEN, "width": WIDTH},
            "results": results,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
