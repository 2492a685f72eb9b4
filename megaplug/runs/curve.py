"""The picture of a run's loss, for people who look before they read."""

from __future__ import annotations

from pathlib import Path

from megaplug.runs.atomic import disk_errors, replaced
from megaplug.runs.metrics import read_metrics, validations


def draw_loss_curve(
    metrics_file: Path, png: Path, title: str, reference_line: tuple[str, float] | None = None
) -> bool:
    """Draw training and validation loss over the steps.

    Args:
        metrics_file: ``metrics.jsonl`` of the run.
        png: Where the picture goes; replaced atomically.
        title: Stands above it.
        reference_line: A label and a loss in nats a token, such as that of a unigram model.

    Returns:
        False if there is no step to draw, and then nothing is written.
    """
    lines = read_metrics(metrics_file)
    steps = [(line["iteration"], line["loss"]) for line in lines if line.get("loss") is not None]
    valid = validations(lines)
    if not steps and not valid:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        few = len(steps) < 40
        axes.plot(
            *zip(*steps, strict=True),
            color="#4c72b0",
            linewidth=1.2,
            marker="." if few else "",
            label="training",
        )
    if valid:
        axes.plot(*zip(*valid, strict=True), color="#c44e52", marker="o", markersize=4, label="validation")
    if reference_line:
        label, value = reference_line
        axes.axhline(value, color="#7f7f7f", linestyle="--", linewidth=1, label=f"{label} ({value:.3f})")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with disk_errors(png, "draw"), replaced(png) as file:
        canvas.print_png(file)
    return True
