"""Trains one model with dense and with dilated attention on the default corpus, and draws both losses.

    python benchmarks/learning_curves.py --runs FOLDER [--json FILE] [--picture FILE] [--help] [WORD ...]

Two runs of ``launch/train.py``, alike but for the attention: ``flash`` on one rank, and ``ring_dilated`` with
every sequence on two. Words are added to both. A run that is there already is continued or taken as it is,
so that the picture can be drawn again. What is drawn stands in each run's ``metrics.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megaplug.plan.pictures import canvas
from megaplug.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
# Sequences four times as long as the default ones; a step has twice as many tokens as theirs.
BOTH = ("model.seq_length=1024", "train.global_batch_size=4", "train.eval_interval=55")
SEGMENTS, RATES = "[128,256,512,1024]", "[1,2,4,8]"
RUNS = {
    "flash": ("attention=flash",),
    "ring_dilated": (
        "attention=ring_dilated",
        f"attention.params.segment_lengths={SEGMENTS}",
        f"attention.params.dilation_rates={RATES}",
        "topology=cp2",
    ),
}
COLOURS = {"flash": canvas.BLUE, "ring_dilated": canvas.ORANGE}


def train(name: str, runs: Path, words: list[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics, after it has ended."""
    typed = [*BOTH, *RUNS[name], *words, f"name={name}", f"runs_dir={runs}"]
    subprocess.run([sys.executable, ROOT / "launch" / "train.py", *typed], check=True)
    (folder,) = runs.glob(f"{name}-*")
    return read_metrics(folder / "metrics.jsonl")


def curve(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Training loss of every step and the validations."""
    steps = [line for line in lines if line.get("loss") is not None]
    valid = [line for line in lines if line.get("valid_loss") is not None and "source" not in line]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "loss": [round(line["loss"], 4) for line in steps],
        "validations": [
            {"iteration": line["iteration"], "split": line["split"], "loss": round(line["valid_loss"], 4)}
            for line in valid
        ],
    }


def draw(report: dict[str, Any], png: Path) -> None:
    """Training losses, smoothed over ten steps, and validations as dots."""
    figure = canvas.new_figure(8, 4.6)
    axes = figure.add_subplot()
    canvas.plain_axes(axes, grid="both")
    for name, found in report["results"].items():
        loss, colour = found["loss"], COLOURS[name]
        mean = [sum(loss[max(0, i - 9) : i + 1]) / len(loss[max(0, i - 9) : i + 1]) for i in range(len(loss))]
        axes.plot(range(1, len(loss) + 1), mean, color=colour, linewidth=1.2, label=f"{name}, training")
        valid = [
            (each["iteration"], each["loss"]) for each in found["validations"] if each["split"] == "valid"
        ]
        label = f"{name}, validation: {valid[-1][1]:.4f} at last"
        axes.plot(*zip(*valid, strict=True), color=colour, marker="o", linestyle="", label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, len(loss) + 4))
    axes.legend(frameon=False, fontsize=9)
    canvas.titled(
        figure,
        "Dense and dilated attention on the default corpus",
        f"tiny, {BOTH[0]}; dilated: {SEGMENTS} x {RATES} on two context-parallel ranks; measured",
    )
    canvas.save(figure, png, {"picture": "learning_curves", **report})


def main() -> None:
    """Parse, train, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="added to both commands")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    from measure import environment  # brings torch, which --help does without

    report = {
        "what": "loss of training and validation, nats a token; measured",
        "commands": {name: " ".join([*BOTH, *words, *options.words]) for name, words in RUNS.items()},
        "results": {name: curve(train(name, options.runs, options.words)) for name in RUNS},
        "machine": environment("cpu"),
    }
    for name, found in report["results"].items():
        print(f"{name:13} {found['loss'][0]:.4f} at first, {found['loss'][-1]:.4f} at last; ", end="")
        print("validation " + ", ".join(f"{v['loss']:.4f} ({v['split']})" for v in found["validations"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.picture:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
