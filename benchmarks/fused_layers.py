"""The native fused layers against what Megatron does in their place, forward and backward, in one run.

    python benchmarks/fused_layers.py [--json FILE]

Each at two sizes: of the default model and of ``tiny_llama3_50m``. The seconds are the process's own, with
one thread, so that a busy machine does not change them much.
"""

from __future__ import annotations

import argparse
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

warnings.filterwarnings("ignore")
# tokens, micro-batch, groups, query heads a group, channels a head, MLP channels, words
SIZES = {"tiny": (256, 4, 2, 2, 32, 352, 384), "tiny_llama3_50m": (1024, 4, 2, 4, 64, 1536, 32000)}
Pair = dict[str, Callable[[], object]]


def swiglu_pair(size: tuple[int, ...], dtype: torch.dtype) -> Pair:
    """Our SwiGLU and Megatron's unfused one (``MLP.forward``)."""
    from megaplug.layers.swiglu import swiglu

    x = torch.randn(size[0], size[1], 2 * size[5], dtype=dtype, requires_grad=True)
    grad = torch.randn(size[0], size[1], size[5], dtype=dtype)

    def unfused() -> None:
        gate, up = torch.chunk(x, 2, dim=-1)
        (F.silu(gate) * up).backward(grad)

    return {"native": lambda: swiglu(x).backward(grad), "megatron": unfused}


def rope_pair(size: tuple[int, ...], dtype: torch.dtype) -> Pair:
    """Our split and rotation, and Megatron's split followed by two unfused rotations."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate

    from megaplug.layers.attention.rotary import _cos_sin, split_and_rotate

    tokens, batch, groups, heads, dim, *_ = size
    mixed = torch.randn(tokens, batch, groups, (heads + 2) * dim, dtype=dtype, requires_grad=True)
    angles = torch.randn(tokens, 1, 1, dim)
    grads = [torch.randn(tokens, batch, n, dim, dtype=dtype) for n in (groups * heads, groups, groups)]

    def unfused() -> None:
        q, k, v = torch.split(mixed, [heads * dim, dim, dim], dim=3)
        q = q.reshape(tokens, batch, -1, dim)
        torch.autograd.backward([rotate(q, angles), rotate(k, angles), v], grads)

    def native() -> None:
        torch.autograd.backward(split_and_rotate(mixed, *_cos_sin(angles, 1.0, dtype), dim), grads)

    return {"native": native, "megatron": unfused}


def cross_entropy_pair(size: tuple[int, ...], dtype: torch.dtype) -> Pair:
    """Our cross-entropy and Megatron's vocabulary-parallel one, on one rank, each on a copy of logits."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as theirs

    from megaplug.layers.cross_entropy import vocab_parallel_cross_entropy as ours

    tokens, batch, words = size[0], size[1], size[6]
    logits = torch.randn(tokens, batch, words, dtype=dtype, requires_grad=True)
    targets = torch.randint(words, (tokens, batch))
    grad = torch.full((tokens, batch), 1 / tokens)
    group = torch.distributed.group.WORLD
    return {
        "native": lambda: ours(logits * 1, targets, group).backward(grad),
        "megatron": lambda: theirs(logits * 1, targets, tp_group=group).backward(grad),
    }


PAIRS = {"SwiGLU": swiglu_pair, "split and RoPE": rope_pair, "cross-entropy": cross_entropy_pair}


def seconds_in_turns(pair: Pair, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for repeat in range(repeats + 1):
        for name, run in pair.items():
            start = time.process_time()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def measure(repeats: int) -> dict[str, Any]:
    """Median CPU seconds of each layer, size and dtype."""
    results: dict[str, Any] = {}
    for name, make in PAIRS.items():
        for size_name, size in SIZES.items():
            for dtype in (torch.float32, torch.bfloat16):
                seconds = seconds_in_turns(make(size, dtype), repeats)
                row: dict[str, float] = {who: median(values) for who, values in seconds.items()}
                pairs = zip(seconds["megatron"], seconds["native"], strict=True)
                row["megatron_over_native"] = median([theirs / ours for theirs, ours in pairs])
                key = f"{name}, {size_name}, {str(dtype).removeprefix('torch.')}"
                results[key] = row
                print(
                    f"{key:44} {row['native'] * 1e3:9.2f} ms   {row['megatron_over_native']:5.2f}x",
                    flush=True,
                )
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    results = measure(options.repeats)
    torch.distributed.destroy_process_group()
    if options.json:
        content = {
            "what": "fused layers, forward and backward; median CPU seconds, measured in turns",
            "machine": environment("cpu") | {"clock": "cpu"},
            "sizes": SIZES,
            "results": results,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
