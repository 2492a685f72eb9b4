"""Trains the small twin of moe_30b and writes down how evenly its experts are used.

    python benchmarks/expert_balance.py --runs FOLDER [--json FILE] [--picture FILE] [--help] [WORD ...]

One run of ``launch/train.py experiment=moe_30b_twin`` on eight ranks; words are added to the command. A run
that is there already is continued or taken as it is. The picture is that of the run's folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "moe_30b_twin"
FIGURES = ("loss", "expert_balance", "expert_drop_rate", "expert_entropy")
# Steps between two of the report, beside the first and the last.
EVERY = 20


def train(runs: Path, words: list[str]) -> RunFolder:
    """The folder of the run, after it has ended."""
    typed = [f"experiment={EXPERIMENT}", f"runs_dir={runs}", *words]
    subprocess.run([sys.executable, ROOT / "launch" / "train.py", *typed], check=True)
    (folder,) = runs.glob(f"{EXPERIMENT}-*")
    return RunFolder(folder)


def figures(folder: RunFolder) -> dict[str, Any]:
    """The whole model's every so many steps; the least balanced layer of the last step."""
    steps = [line for line in read_metrics(folder.metrics_file) if "expert_balance" in line]
    last = steps[-1]
    shown = [line for line in steps if line["iteration"] % EVERY == 0 or line is steps[0] or line is last]
    of_layers = [value for name, value in last.items() if name.startswith("expert_balance/")]
    return {
        "steps": [
            {"iteration": line["iteration"], **{name: round(line[name], 4) for name in FIGURES}}
            for line in shown
        ],
        "least_balanced_layer_at_the_end": round(min(of_layers), 4),
    }


def main() -> None:
    """Parse, train, write, copy the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="added to the command")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    folder = train(options.runs, options.words)
    from measure import environment  # brings torch, which --help does without

    report = {
        "what": "expert_balance: mean over maximum of what the ranks of expert parallelism took; measured",
        "command": " ".join([f"experiment={EXPERIMENT}", *options.words]),
        **figures(folder),
        "machine": environment("cpu"),
    }
    for step in report["steps"]:
        print(
            f"step {step['iteration']:4}  loss {step['loss']:.4f}  balance {step['expert_balance']:.3f}  "
            f"dropped {step['expert_drop_rate']:.3f}  entropy {step['expert_entropy']:.3f}"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.picture:
        shutil.copyfile(folder.path / "experts.png", options.picture)


if __name__ == "__main__":
    main()
