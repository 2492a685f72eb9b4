"""The peak memory of each rank's attention, forward and backward, as more ranks share the sequences.

    python benchmarks/context_parallel_memory.py [--ranks 1 2 4 8] [--seq-length 8192] [--json FILE]
        [--picture FILE] [--help]

Every rank is a fresh process with gloo between them. After a small warm-up it makes its part of query, key,
value and the output's gradient, attends, and goes back; the rise of its resident high-water mark over all
that is its peak: what it holds, what it computes with and what is under way between ranks. Large tensors are
mapped one by one, so that freed memory is not counted again. Bytes received are those of the forward pass, by
the layer's counter, and beside them what ``describe`` says of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import environment, peak_bytes
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megaplug.layers.attention.describe import Sizes, describe
from megaplug.layers.attention.dilated import dilated_attention
from megaplug.layers.attention.exchange import FORWARD, counted_traffic
from megaplug.plan.pictures import canvas

MIB = 2**20
WARM_UP = 64  # tokens
# Attention, layout of the tokens, the most tokens of a message, and how it is drawn.
CASES = {
    "ring, zigzag": ("ring", "zigzag", None, canvas.VERMILION),
    "ring, zigzag, block_size=512": ("ring", "zigzag", 512, canvas.BLUE),
    "ring_dilated, zigzag": ("ring_dilated", "zigzag", None, canvas.ORANGE),
    "ring_dilated, contiguous": ("ring_dilated", "contiguous", None, canvas.GREEN),
}


def pattern(attention: str, num_tokens: int) -> tuple[list[int], list[int]]:
    """The whole for ``ring``; a 64th to the whole of the sequence at the rates 1 to 8 for the other."""
    if attention == "ring":
        return [num_tokens], [1]
    return [num_tokens // part for part in (64, 16, 4, 1)], [1, 2, 4, 8]


def attend(options: argparse.Namespace, num_tokens: int, group: dist.ProcessGroup | None) -> None:
    """One rank's forward and backward pass, its tensors included."""
    attention, layout, block_size, _ = CASES[options.case]
    here = num_tokens // options.world

    def random(heads: int) -> Tensor:
        return torch.randn(options.batch_size, here, heads, options.head_dim)

    leaves = [random(heads).requires_grad_() for heads in (options.heads, *[options.kv_heads] * 2)]
    grad = random(options.heads)
    out = dilated_attention(
        *leaves, *pattern(attention, num_tokens), group=group, layout=layout, block_size=block_size
    )
    out.backward(grad)


def be_a_rank(options: argparse.Namespace) -> None:
    """Measure, and print it as one line of JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(options.rank)
    group = None
    if options.world > 1:
        store = f"file://{options.store}"
        dist.init_process_group("gloo", init_method=store, rank=options.rank, world_size=options.world)
        group = dist.group.WORLD
    attend(options, WARM_UP, group)
    with counted_traffic() as traffic:
        peak = peak_bytes(lambda: attend(options, options.seq_length, group), "cpu")
    print(json.dumps({"peak_bytes": peak, "received_bytes": traffic.received.get(FORWARD, 0)}))


def run_ranks(options: argparse.Namespace, case: str, world: int) -> list[dict[str, int]]:
    """What each rank of one world says."""
    # See benchmarks/attention.py.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--world", str(world)]
        words += ["--store", f"{folder}/store"]
        ranks = [
            subprocess.Popen([*words, "--rank", str(rank)], env=env, stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        said = [rank.communicate()[0] for rank in ranks]
    if failed := [number for number, rank in enumerate(ranks) if rank.returncode]:
        raise SystemExit(f"ranks {failed} of {world} failed; what they said stands above")
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every case on every number of ranks."""
    sizes = Sizes(
        options.seq_length, options.heads, options.kv_heads, options.head_dim, 4, options.batch_size
    )
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        attention, layout, block_size, _ = CASES[case]
        alone = 0
        for world in options.ranks:
            ranks = run_ranks(options, case, world)
            peaks = [rank["peak_bytes"] for rank in ranks]
            alone = alone or max(peaks) * world
            segments, rates = pattern(attention, options.seq_length)
            described = describe(sizes, segments, rates, num_ranks=world, layout=layout)
            row = {
                "attention": attention,
                "layout": layout,
                "block_size": block_size,
                "ranks": world,
                "peak_bytes": peaks,
                "one_over": alone / max(peaks),
                "received_bytes": [rank["received_bytes"] for rank in ranks],
                "described_bytes": described["received_bytes"]["largest"],
                "described_saved_bytes": described["saved_bytes"],
            }
            rows.append(row)
            show(row)
    left_out = ("json", "picture", "case", "cases", "rank", "world", "store")
    return {
        "what": "attention, causal, forward and backward, fp32: peak of a rank's resident memory over what "
        "it was before its tensors were made; measured",
        "sizes": {key: value for key, value in vars(options).items() if key not in left_out},
        "machine": environment("cpu"),
        "results": rows,
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    peak, received = max(row["peak_bytes"]) / MIB, max(row["received_bytes"]) / MIB
    print(
        f"{row['attention']:13} {row['layout']:11} {row['block_size'] or '-':>5} {row['ranks']:5} "
        f"{peak:10.1f} {row['one_over']:9.2f} {received:12.1f} {row['described_bytes'] / MIB:10.1f}",
        flush=True,
    )


def draw(report: dict[str, Any], png: Path) -> None:
    """Peaks over ranks, both by powers of two, and the line of one rank's peak over the number of ranks."""
    figure = canvas.new_figure(7.5, 4.6)
    axes = figure.add_subplot()
    canvas.plain_axes(axes, grid="both")
    for name, (*case, colour) in CASES.items():
        keys = ("attention", "layout", "block_size")
        rows = [row for row in report["results"] if [row[key] for key in keys] == case]
        if not rows:
            continue
        ranks = [row["ranks"] for row in rows]
        peaks = [max(row["peak_bytes"]) / MIB for row in rows]
        axes.plot(ranks, peaks, marker="o", color=colour, label=f"attention={name}")
        ideal = [peaks[0] * ranks[0] / count for count in ranks]
        axes.plot(ranks, ideal, color=colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="context-parallel ranks", ylabel="MiB of a rank at its peak")
    every = sorted({row["ranks"] for row in report["results"]})
    axes.set_xticks(every, [str(count) for count in every])
    axes.minorticks_off()
    ticks = [2**power for power in range(4, 14)]
    low, high = axes.get_ylim()
    axes.set_yticks(
        [tick for tick in ticks if low <= tick <= high], [str(t) for t in ticks if low <= t <= high]
    )
    axes.legend(frameon=False, fontsize=9)
    sizes = report["sizes"]
    canvas.titled(
        figure,
        "Peak memory of a rank's attention, forward and backward",
        f"{sizes['seq_length']:,} tokens, {sizes['heads']} heads of "
        f"{sizes['head_dim']}, {sizes['kv_heads']} key-value heads, fp32, CPU; measured; dotted: 1 / ranks",
    )
    canvas.save(figure, png, {"picture": "context_parallel_memory", **report})


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if wrong := [ranks for ranks in options.ranks if ranks < 1]:
        parser.error(f"--ranks {wrong[0]}: give numbers of at least 1")
    if options.rank is not None:
        be_a_rank(options)
        return
    print(
        f"{'attention':13} {'layout':11} {'block':>5} {'ranks':>5} {'peak MiB':>10} {'of one: /':>9} ", end=""
    )
    print(f"{'received MiB':>12} {'described':>10}")
    report = measure(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.picture:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
