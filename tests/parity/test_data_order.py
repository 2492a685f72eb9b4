"""Which samples each step sees: those of the weights, in the same order however often a run is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from small_jobs import SmallJobs, state, steps

from megaplug.runs.metrics import read_metrics

WEIGHTS = {"letters": 0.5, "capitals": 0.3, "digits": 0.2}
ALPHABETS = {"letters": "abcdefgh", "capitals": "ABCDEFGH", "digits": "01234567"}
ITERS = 10
WORDS = [f"train.iters={ITERS}", "train.eval_iters=2", "train.eval_interval=5", "model.num_layers=2"]


def write_sources(root: Path) -> dict[str, Path]:
    """Documents of random characters, so that no two samples are equal and each shows its source."""
    chance = random.Random(3)
    for name, alphabet in ALPHABETS.items():
        (root / name).mkdir(parents=True)
        for number in range(30):
            text = "".join(chance.choices(alphabet, k=1200))
            (root / name / f"{number}.txt").write_text(text)
    return {name: root / name for name in ALPHABETS}


def record(folder: Path) -> None:
    """In each rank: writes down the samples of each micro-batch of training."""
    import torch
    from megatron.training.global_vars import get_args

    from megaplug.runtime import batch

    real = batch.get_batch

    def get_batch(*args: object) -> dict[str, object]:
        found = real(*args)
        if torch.is_grad_enabled():
            samples = [bytes(i for i in row if i < 256).decode() for row in found["tokens"].tolist()]
            line = {"iteration": get_args().curr_iteration, "samples": samples}
            with (folder / f"rank{os.environ['RANK']}").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        return found

    batch.get_batch = get_batch


class Watched:
    """Runs jobs over the blend and tells what each step saw."""

    def __init__(self, name: str, jobs: SmallJobs, words: list[str]) -> None:
        self.name = name
        self.jobs = jobs
        self.words = [*WORDS, *words]
        self._count = 0

    def run(self, *words: str):
        """The folder, and the samples of each step in the order of the global batch."""
        self._count += 1
        folder = self.jobs.root / f"seen by {self.name}" / str(self._count)
        folder.mkdir(parents=True)
        run = self.jobs.run([*self.words, *words], plant=partial(record, folder))
        files = sorted(folder.iterdir())
        ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        seen: dict[int, list[str]] = {}
        for of_ranks in zip(*ranks, strict=True):
            (iteration,) = {line["iteration"] for line in of_ranks}
            seen.setdefault(iteration + 1, []).extend(s for line in of_ranks for s in line["samples"])
        return run, seen


def blend(root: Path) -> list[str]:
    entries = ",".join(f"{name}:{{path:{root / name},weight:{WEIGHTS[name]}}}" for name in WEIGHTS)
    return [f"data.path={{{entries}}}"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> SmallJobs:
    jobs = SmallJobs(tmp_path_factory.mktemp("order"))
    write_sources(jobs.root / "sources")
    return jobs


@pytest.fixture(scope="module")
def blended(jobs) -> Watched:
    return Watched("blend", jobs, blend(jobs.root / "sources"))


@pytest.fixture(scope="module")
def undisturbed(blended):
    return blended.run("name=undisturbed")


def source_of(sample: str) -> str:
    (name,) = {name for name, alphabet in ALPHABETS.items() if set(sample) <= set(alphabet)}
    return name


def test_samples_are_drawn_in_their_weights_from_the_first_on(undisturbed):
    _, seen = undisturbed
    order = [source_of(sample) for iteration in sorted(seen) for sample in seen[iteration]]
    assert len(order) == 8 * ITERS
    drawn: Counter[str] = Counter()
    for number, name in enumerate(order, start=1):
        drawn[name] += 1
        assert all(abs(drawn[name] - weight * number) <= 1 for name, weight in WEIGHTS.items()), number


def test_no_sample_is_seen_twice(undisturbed):
    _, seen = undisturbed
    samples = [sample for iteration in seen for sample in seen[iteration]]
    assert len({hashlib.sha256(sample.encode()).digest() for sample in samples}) == len(samples) == 8 * ITERS


@pytest.mark.parametrize("dp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_resumed_sees_what_an_undisturbed_one_sees(dp, blended, undisturbed):
    _, wanted = undisturbed
    words = [f"name=stopped{dp}", f"topology.dp={dp}"]
    folder, before = blended.run(*words, "train.stop_at=3")
    assert state(folder).iteration == 3
    again, after = blended.run(*words)
    assert again.path == folder.path
    assert sorted(before) == [1, 2, 3] and sorted(after) == list(range(4, ITERS + 1))
    assert before | after == wanted


@pytest.mark.slow
def test_the_state_of_a_run_goes_on_under_another_dp_where_it_was_in_the_data(blended, undisturbed):
    _, wanted = undisturbed
    folder, before = blended.run("name=moved", "train.stop_at=4")
    there = f"load={folder.path}"
    _, after = blended.run("name=moved_to", "topology.dp=2", there, "load_state=all")
    assert before | after == wanted


@pytest.mark.slow
def test_one_source_that_is_stopped_twice_sees_what_an_undisturbed_run_sees(jobs):
    one = Watched("one", jobs, [f"data.path={jobs.root / 'sources' / 'letters'}"])
    _, wanted = one.run("name=one")
    seen: dict[int, list[str]] = {}
    for stop in ("train.stop_at=2", "train.stop_at=7", "train.stop_at=null"):
        seen |= one.run("name=one_stopped", "topology.dp=2", stop)[1]
    assert seen == wanted


def test_each_source_has_a_validation_loss_and_they_add_up_to_the_whole(undisturbed):
    folder, _ = undisturbed
    lines = [line for line in read_metrics(folder.metrics_file) if "valid_loss" in line]
    at = {line["iteration"] for line in lines}
    assert at == {5, 10}
    for iteration in at:
        of = {line.get("source"): line["valid_loss"] for line in lines if line["iteration"] == iteration}
        assert set(of) == {None, *WEIGHTS}
        # Sixteen samples of equal length: 8, 5 and 3 of them, give or take one.
        low, high = min(v for k, v in of.items() if k), max(v for k, v in of.items() if k)
        assert low < of[None] < high
    assert len(steps(folder)) == ITERS
