"""The picture of how evenly a run's experts are used: layers by experts, and over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaplug.runs.atomic import disk_errors, replaced
from megaplug.runs.metrics import read_metrics

# Logged steps that the map sums up: so many tokens that chance is not what is seen.
LAST_STEPS = 20
_MOST_LABELS = 16


def draw_expert_map(metrics_file: Path, png: Path, title: str) -> bool:
    """Draw each expert's share of its layer's tokens in the last logged steps, and balance over all steps.

    Args:
        metrics_file: ``metrics.jsonl`` of the run.
        png: Where the picture goes; replaced atomically.
        title: Stands above it.

    Returns:
        False if no step has told of experts, and then nothing is written.
    """
    lines = [line for line in read_metrics(metrics_file) if line.get("tokens_per_expert")]
    if not lines:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = lines[-LAST_STEPS:]
    layers, shares = shares_of_experts(last)
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    # An even share is white; none and twice as much are the ends.
    image = left.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    steps = f"steps {last[0]['iteration']:,} to {last[-1]['iteration']:,}"
    left.set(title=f"tokens of an expert over an even share, {steps}", xlabel="expert", ylabel="layer")
    rows = range(0, len(layers), -(-len(layers) // _MOST_LABELS))
    left.set_yticks(rows, [layers[row] for row in rows])
    num_experts = max(map(len, shares))
    left.set_xticks(range(0, num_experts, -(-num_experts // _MOST_LABELS)))
    figure.colorbar(image, ax=left, extend="max")
    numbers = [line["iteration"] for line in lines]
    marker = "." if len(lines) < 40 else ""
    for name, colour, label in (
        ("expert_balance", "#4c72b0", "balance: mean over maximum of the ranks"),
        ("expert_entropy", "#55a868", "entropy over the largest possible"),
        ("expert_drop_rate", "#c44e52", "share of tokens dropped"),
    ):
        values = [line.get(name) for line in lines]
        right.plot(numbers, values, color=colour, linewidth=1.2, marker=marker, label=label)
    right.set(xlabel="step", ylim=(-0.02, 1.02), title=title)
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    with disk_errors(png, "draw"), replaced(png) as file:
        canvas.print_png(file)
    return True


def shares_of_experts(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[float]]]:
    """Layer numbers, and for each layer what its experts got over an even share.

    Args:
        lines: With ``tokens_per_expert``, the counts by layer.
    """
    sums: dict[str, list[int]] = {}
    for line in lines:
        for layer, counts in line["tokens_per_expert"].items():
            before = sums.get(layer, [0] * len(counts))
            sums[layer] = [one + other for one, other in zip(before, counts, strict=True)]
    layers = sorted(sums, key=int)
    even = {layer: sum(sums[layer]) / len(sums[layer]) or 1.0 for layer in layers}
    return layers, [[count / even[layer] for count in sums[layer]] for layer in layers]
