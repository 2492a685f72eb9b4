"""Small whole jobs for tests: composed, checked and frozen as the launcher does it, run on forked ranks."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ranks import run_ranks

from megaplug.commands.readiness import make_ready, open_folder
from megaplug.commands.resolved import resolve
from megaplug.data.prepare import prepare
from megaplug.job.compose import compose_job
from megaplug.job.freeze import read_frozen, write_frozen
from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import read_metrics
from megaplug.runs.state import RunState, read_state

SMALL = [
    "name=small",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=64",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "train.eval_iters=0",
    "device=cpu",
]


def write_corpus(folder: Path) -> Path:
    """A corpus with something to learn in it: sentences of a tiny grammar, always the same."""
    chance = random.Random(7)
    subjects = ["the cat", "a dog", "my bird"]
    verbs, objects = ["sees", "hears", "likes"], ["fish", "rain", "it"]
    folder.mkdir()
    for number in range(20):
        sentences = [
            f"{chance.choice(subjects)} {chance.choice(verbs)} {chance.choice(objects)}." for _ in range(200)
        ]
        (folder / f"{number:02d}.txt").write_text(" ".join(sentences))
    return folder


def prepared_corpus(place: Path) -> list[str]:
    """Words for the little corpus, tokenized below a folder."""
    there = [f"data.path={write_corpus(place / 'corpus')}", f"data.cache_dir={place / 'cache'}"]
    prepare(compose_job([*SMALL, *there]), show_progress=False)
    return there


class SmallJobs:
    """Runs jobs over one corpus below one folder.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = write_corpus(root / "corpus")
        self._count = 0

    def words(self, overrides: Sequence[str]) -> list[str]:
        """The whole list of overrides of a job."""
        places = [f"runs_dir={self.root / 'runs'}", f"data.cache_dir={self.root / 'cache'}"]
        return [*SMALL, f"data.path={self.corpus}", *places, *overrides]

    def freeze(self, overrides: Sequence[str]) -> tuple[RunFolder, int]:
        """The folder of a job that is ready to start, and its number of ranks."""
        resolved = resolve(compose_job(self.words(overrides)), on_this_machine=False)
        folder = open_folder(resolved)
        make_ready(resolved, folder)
        return folder, resolved.topology.world_size

    def run(
        self,
        overrides: Sequence[str],
        *,
        skip_repairs: frozenset[str] = frozenset(),
        plant: Any = None,
        without: Sequence[str] = (),
    ) -> RunFolder:
        """Start or continue a job on forked ranks and wait for its end.

        Args:
            overrides: As on the command line.
            skip_repairs: Repairs of Megatron to leave out.
            plant: A module-level function that each rank calls first, to put a fault in place.
            without: Words of Megatron's command line to leave out, though megaplug always gives them.
        """
        folder, world_size = self.freeze(overrides)
        frozen = read_frozen(folder.job_file)
        assert set(without) <= set(frozen.megatron_args)
        left = [word for word in frozen.megatron_args if word not in without]
        write_frozen(dataclasses.replace(frozen, megatron_args=left))
        self._count += 1
        logs = self.root / "ranks" / f"{self._count:03d}"
        run_ranks(world_size, run_rank, str(folder.job_file), skip_repairs, plant, folder=logs)
        return folder


def run_rank(job_file: str, skip_repairs: frozenset[str], plant: Any) -> None:
    """What each forked rank does."""
    from megaplug.runtime import environment
    from megaplug.runtime.pretrain import run

    # What the fork server was started with stands for no wish of a person's.
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    environment.prepare(read_frozen(Path(job_file)))
    run(Path(job_file), skip_repairs=skip_repairs, plant=plant)


def steps(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are training steps."""
    return [line for line in read_metrics(folder.metrics_file) if "loss" in line]


def curve(folder: RunFolder) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step, unrounded."""
    return [(line["loss"], line["grad_norm"]) for line in steps(folder)]


def validations(folder: RunFolder) -> list[tuple[int, float]]:
    """Iteration and loss of every validation, unrounded."""
    lines = read_metrics(folder.metrics_file)
    whole = [line for line in lines if "valid_loss" in line and "source" not in line]
    return [(line["iteration"], line["valid_loss"]) for line in whole]


def state(folder: RunFolder) -> RunState:
    """The run's state, which must exist."""
    found = read_state(folder.state_file)
    assert found is not None
    return found
