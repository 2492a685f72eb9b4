"""Small jobs started as a person starts them, several at once, and what their steps came to."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import ROOT, Setting

SMALL = [
    "model.num_layers=4", "model.hidden_size=128", "model.ffn_hidden_size=256", "model.seq_length=128",
    "model.num_attention_heads=8", "model.num_query_groups=2", "train.micro_batch_size=2",
    "train.global_batch_size=8", "train.eval_iters=0", "lr=constant", "lr.lr=1e-3", "logging.progress=plain",
    "logging.tensorboard=false",
]  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A job that was started.

    Attributes:
        name: What it is called.
        process: The launcher.
        runs: The folder that holds its run.
        log: What it says.
    """

    name: str
    process: subprocess.Popen[bytes]
    runs: Path
    log: Path


class Jobs:
    """Starts jobs over one corpus, each in a folder of its own.

    Args:
        setting: Where.
        words: Overrides of all of them; the small model where not given.
    """

    def __init__(self, setting: Setting, words: Sequence[str] = SMALL) -> None:
        self.setting = setting
        self.words = list(words)
        self.corpus = write_corpus(setting.work / "corpus")

    def start(self, name: str, *words: str, device: str | None = None) -> Running:
        """Start ``launch/train.py`` in the folder ``name``; the same name again continues its run."""
        runs = self.setting.work / "runs" / name
        runs.mkdir(parents=True, exist_ok=True)
        log = runs / "launcher.log"
        places = [
            f"runs_dir={runs}",
            f"data.path={self.corpus}",
            f"data.cache_dir={self.setting.work / 'cache'}",
        ]
        device = f"device={device or self.setting.device}"
        command = [sys.executable, "launch/train.py", "name=job", *self.words, *places, device, *words]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment()
            )
        return Running(name, process, runs, log)

    def finish(self, running: Running) -> Path:
        """Wait for a job and return its run's folder.

        Raises:
            RuntimeError: It failed; the message holds the end of what it and its rank said.
        """
        code = running.process.wait()
        folders = sorted(path.parent for path in running.runs.glob("*/job.yaml"))
        if code != 0 or len(folders) != 1:
            logs = [running.log, *running.runs.glob("*/logs/rank0.log")]
            tails = "\n".join(f"--- {log.name}\n" + "\n".join(_lines(log)[-25:]) for log in logs)
            raise RuntimeError(f"{running.name} ended with {code}\n{tails}")
        return folders[0]

    def run(self, name: str, *words: str, device: str | None = None) -> Path:
        """Start a job and wait for it."""
        return self.finish(self.start(name, *words, device=device))


def environment() -> dict[str, str]:
    """Threads are shared out: several jobs run at once."""
    threads = max(1, (os.cpu_count() or 1) // 4)
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are training steps."""
    lines = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    return [line for line in lines if "loss" in line]


def curve(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step, unrounded; NaN where a step has none, as a skipped one."""
    return [tuple(_number(line[key]) for key in ("loss", "grad_norm")) for line in steps(folder)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def largest_difference(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> float:
    """Relative, over losses and gradient norms of all steps; infinite where steps or figures are missing."""
    if len(found) != len(wanted) or not found:
        return math.inf
    pairs = zip(sum(found, ()), sum(wanted, ()), strict=True)
    differences = [abs(one - other) / abs(other) for one, other in pairs]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def kernels(folder: Path) -> dict[str, Any]:
    """What the run says that it computed with."""
    return json.loads((folder / "kernels.json").read_text())


def write_corpus(folder: Path, sentences: int = 4000) -> Path:
    """Text with something to learn in it, always the same."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    chance = random.Random(7)
    parts = (["the cat", "a dog", "my bird"], ["sees", "hears", "likes"], ["fish", "rain", "it"])
    for number in range(8):
        text = [" ".join(chance.choice(part) for part in parts) + "." for _ in range(sentences)]
        (folder / f"{number}.txt").write_text(" ".join(text))
    return folder


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()
