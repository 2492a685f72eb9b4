"""How long a person waits: for the launcher's answer, and from typing the command to the first training step.

The peer of the second is what no Megatron program can do without: a Python that imports
``megatron.training`` and ends. The ratio says how much megaplug adds to that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import environment, median

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "launch" / "train.py")]


def seconds_to_end(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_to_first_step(overrides: list[str]) -> float:
    """Wall seconds until the first ``step`` event of a run in a new folder; the run is then left to end."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "train.iters=2",
            "train.eval_iters=0",
            "launch.output=json",
            f"runs_dir={folder}",
            *overrides,
        ]
        start = time.perf_counter()
        with subprocess.Popen([*TRAIN, *words], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line).get("event") == "step":
                    seconds = time.perf_counter() - start
                    break
            else:
                raise RuntimeError("the run ended without a step")
            process.stdout.read()
        if process.returncode != 0:
            raise RuntimeError(f"the run ended with {process.returncode}")
    return seconds


def main() -> None:
    """Measure in turns, print a table with ratios and, with ``--json FILE``, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    python = [sys.executable, "-W", "ignore", "-c"]
    contenders: dict[str, Callable[[], float]] = {
        "python -c 'import hydra'": lambda: seconds_to_end([*python, "import hydra"]),
        "train.py --cfg job": lambda: seconds_to_end([*TRAIN, "--cfg", "job"]),
        "import megatron.training": lambda: seconds_to_end([*python, "import megatron.training.training"]),
        "first step, 1 rank": lambda: seconds_to_first_step([]),
        "first step, tp2_pp2": lambda: seconds_to_first_step(["topology=tp2_pp2"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            seconds[name].append(run())
    medians = {name: median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:28} {value:7.2f} s   (fastest {min(seconds[name]):.2f} s)")
    added = medians["first step, 1 rank"] / medians["import megatron.training"]
    print(f"first step over import of megatron.training: {added:.2f}x")
    if arguments.json:
        content = {
            "what": "seconds a person waits; measured",
            "machine": environment("cpu"),
            "median_s": medians,
            "fastest_s": {name: min(values) for name, values in seconds.items()},
            "first_step_over_import": added,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
