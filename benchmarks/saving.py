"""For how long training stands still while it is saved: waiting for the checkpoint, and going on meanwhile.

Two whole runs of ``launch/train.py`` for each model, on one rank, in turns: one with
``checkpoint.async_save=false``, one with ``true``. The large model has weights of 500 MB; its checkpoints
also hold Adam's moments and the weights it steps. What a writer costs the steps beside it is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import environment, median

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "launch" / "train.py")]
QUIET = ["launch.output=json", "device=cpu", "train.eval_iters=0", "logging.tensorboard=false"]
MODELS = {
    "weights of 500 MB": [
        "model.num_layers=8", "model.hidden_size=1024", "model.ffn_hidden_size=4096",
        "model.num_attention_heads=8", "model.num_query_groups=8", "model.seq_length=64",
        "train.micro_batch_size=1", "train.global_batch_size=1", "checkpoint.keep=1",
        "train.iters=31", "checkpoint.save_interval=16",
    ],
    "the default model": ["train.iters=151", "checkpoint.save_interval=50"],
}  # fmt: skip


@dataclass(frozen=True)
class Saves:
    """What saving cost a run; the last save is left out, after which there is nothing to go on with.

    Attributes:
        seconds: Of each save, until the checkpoint had its name.
        stood_still: Seconds of each in which training waited.
        step: The middle of the steps beside which nothing was written, in seconds.
        slowed: Seconds by which the steps beside each writer took longer than that.
        checkpoint_bytes: Of one.
    """

    seconds: list[float]
    stood_still: list[float]
    step: float
    slowed: list[float]
    checkpoint_bytes: int


def measure(words: list[str]) -> Saves:
    """Train once in a new folder, and read what the run tells of itself."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        command = [*TRAIN, *QUIET, *words, f"runs_dir={folder}/runs"]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        newest = max(Path(folder).glob("runs/*/checkpoints/iter_*"))
        size = sum(file.stat().st_size for file in newest.iterdir())
    return read(events, size)


def read(events: list[dict[str, Any]], checkpoint_bytes: int) -> Saves:
    """The figures of a run from what it has told, in that order."""
    steps = [(event["iteration"], event["seconds"]) for event in events if event["event"] == "step"]
    told = [number for number, event in enumerate(events) if event["event"] == "saved"]
    saves = [(events[number], _last_step(events[:number])) for number in told]
    saves = [(saved, reached) for saved, reached in saves if saved["iteration"] < steps[-1][0]]
    beside = {step for saved, reached in saves for step in range(saved["iteration"] + 1, reached + 2)}
    # The first step pays for what is made once.
    usual = median([seconds for step, seconds in steps[1:] if step not in beside])
    slowed = [
        sum(seconds - usual for step, seconds in steps if saved["iteration"] < step <= reached + 1)
        for saved, reached in saves
    ]
    return Saves(
        [saved["seconds"] for saved, _ in saves],
        [saved["stood_still"] for saved, _ in saves],
        usual,
        slowed,
        checkpoint_bytes,
    )


def _last_step(events: list[dict[str, Any]]) -> int:
    return max((event["iteration"] for event in events if event["event"] == "step"), default=0)


def main() -> None:
    """Measure in turns, print a table with ratios and, with ``--json FILE``, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for model, words in MODELS.items():
        found: dict[str, list[Saves]] = {"false": [], "true": []}
        for _ in range(arguments.repeats):
            for asked, runs in found.items():
                runs.append(measure([*words, f"checkpoint.async_save={asked}"]))
        waits, goes_on = ({key: _middle(runs, key) for key in _FIGURES} for runs in found.values())
        size = found["true"][0].checkpoint_bytes
        ratio = goes_on["stood_still"] / waits["seconds"]
        print(f"{model}: a checkpoint of {size / 1e6:,.1f} MB, steps of {waits['step']:.3f} s")
        print(f"  training waits      {waits['seconds']:8.3f} s")
        print(f"  training goes on    {goes_on['stood_still']:8.3f} s stood still: {ratio:.3f} of that")
        print(f"    until it is named {goes_on['seconds']:8.3f} s")
        print(f"    steps beside it   {goes_on['slowed']:8.3f} s longer altogether")
        results[model] = {
            "checkpoint_bytes": size,
            "stood_still_over_waiting": ratio,
            "median": {"waits": waits, "goes_on": goes_on},
            "runs": {asked: [asdict(run) for run in runs] for asked, runs in found.items()},
        }
    if arguments.json:
        machine = environment("cpu") | {"load_of_the_last_minute": os.getloadavg()[0]}
        content = {"what": "seconds of a save on one rank; measured", "machine": machine, "models": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


_FIGURES = ("seconds", "stood_still", "step", "slowed")


def _middle(runs: list[Saves], key: str) -> float:
    values = [getattr(run, key) for run in runs]
    return median([one for value in values for one in (value if isinstance(value, list) else [value])])


if __name__ == "__main__":
    main()
