"""A run that is killed, interrupted or left alone is continued by the same command as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_command import (
    Live,
    await_nobody,
    await_run,
    await_save,
    await_save_begun,
    half_written,
    joined_curve,
    newest_whole,
    only_run,
    processes_of,
    train,
)
from small_jobs import SMALL, state, write_corpus

from megaplug.runs.folder import RunFolder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ITERS = 40
LAYOUTS = {1: ["train.micro_batch_size=4"], 2: ["train.micro_batch_size=2", "topology.dp=2"]}


@dataclass
class Job:
    """One job in two runs: undisturbed, and whatever a test does to it.

    Attributes:
        words: Its overrides but for the place of its runs.
        curve: What was measured when nobody disturbed it.
        startup_s: From typing the command to the first step.
        writing_s: From the appearance of the folder that is written to the checkpoint's name.
    """

    words: list[str]
    curve: list[tuple[object, ...]]
    startup_s: float
    writing_s: float


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def jobs(place: Path) -> dict[int, Job]:
    return {}


@pytest.fixture
def job(request: pytest.FixtureRequest, place: Path, jobs: dict[int, Job]) -> Job:
    """The job on as many ranks as the test asks for; its undisturbed run is made once."""
    world_size = getattr(request, "param", 1)
    if world_size not in jobs:
        jobs[world_size] = _undisturbed(place, world_size)
    return jobs[world_size]


def _undisturbed(place: Path, world_size: int) -> Job:
    words = [
        *SMALL,
        "model.num_layers=2",
        "train.global_batch_size=4",
        f"train.iters={ITERS}",
        "train.eval_iters=1",
        "train.eval_interval=10",
        "checkpoint.save_interval=5",
        *LAYOUTS[world_size],
        f"data.path={place / 'corpus'}",
        f"data.cache_dir={place / 'cache'}",
    ]
    began = time.monotonic()
    with Live([*words, f"runs_dir={place / f'undisturbed{world_size}'}"]) as live:
        live.until_step(1)
        startup_s = time.monotonic() - began
        folder = only_run(place / f"undisturbed{world_size}")
        # The quickest of three.
        writing_s = min(await_save(folder) for _ in range(3))
        assert live.end() == 0, live.stderr()
    curve = joined_curve(folder)
    assert [line[0] for line in curve if len(line) == 4] == list(range(1, ITERS + 1))
    return Job(words, curve, startup_s, writing_s)


def finish(job: Job, words: list[str], folder: RunFolder) -> None:
    """The same command once more; all parts together are the run that was never disturbed."""
    expected = newest_whole(folder)
    with Live(words) as live:
        assert live.end() == 0, live.stderr()
    assert_resumed(live, expected)
    found = state(folder)
    assert (found.status, found.iteration, found.saved_iteration, found.rank) == (
        "finished",
        ITERS,
        ITERS,
        None,
    )
    assert joined_curve(folder) == job.curve
    assert processes_of(folder) == []


def assert_resumed(live: Live, expected: int) -> None:
    """It said from where it goes on, and that was the newest whole checkpoint."""
    (header,) = live.of("header")
    assert header.get("resumes") == (f"from step {expected}" if expected else None)
    steps = [event["iteration"] for event in live.of("step")]
    assert steps[:1] in ([], [expected + 1])


def kill_at(live: Live, moment: str, rank: int, job: Job, chance: random.Random, runs_dir: Path) -> None:
    """SIGKILL to a rank: while it starts, between two steps, or while a checkpoint is written."""
    if moment == "start":
        await_run(runs_dir)
        while (pid := live.rank_pids().get(rank)) is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.8) * job.startup_s)
    else:
        first = live.until(lambda event: event["event"] == "step")["iteration"]
        pid = live.rank_pids()[rank]
        if moment == "step":
            live.until_step(first + 5 + chance.randrange(4))  # beyond the next checkpoint
            time.sleep(chance.uniform(0.0, 0.05))
        else:
            if moment == "second save":
                await_save(only_run(runs_dir))
            await_save_begun(only_run(runs_dir))
            time.sleep(chance.uniform(0.0, 0.7) * job.writing_s)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("job", "moments", "seed"),
    [
        pytest.param(1, ["second save", "start", "step", "save", "step"], 11, marks=pytest.mark.soak),
        (2, ["save", "start", "step", "second save"], 12),
    ],
    indirect=["job"],
    ids=["1 rank", "2 ranks"],
)
def test_whoever_is_killed_whenever_the_same_command_goes_on(
    job: Job, moments: list[str], seed: int, tmp_path: Path
) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    world_size = 2 if "topology.dp=2" in job.words else 1
    words = [*job.words, f"runs_dir={tmp_path / 'runs'}"]
    expected, broken = 0, 0
    for number, moment in enumerate(moments):
        rank = chance.randrange(world_size)
        with Live(words) as live:
            kill_at(live, moment, rank, job, chance, tmp_path / "runs")
            assert live.end() == 1
        folder = only_run(tmp_path / "runs")
        assert processes_of(folder) == [], f"left over after kill {number} ({moment})"
        assert_resumed(live, expected)
        after = state(folder)
        print(f"kill {number} of rank {rank} ({moment}): {after}, half-written {half_written(folder)}")
        assert (after.status, after.rank) == ("failed", rank)
        assert after.reason.startswith(f"rank {rank} was killed by signal 9 (SIGKILL)")
        expected = newest_whole(folder)
        assert after.saved_iteration <= expected <= after.iteration
        broken += bool(half_written(folder))
    assert broken, "no kill has hit a save"
    assert expected > 0, "no kill has come after a save"
    finish(job, words, folder)


@pytest.mark.parametrize("job", [2], indirect=True, ids=["2 ranks"])
def test_a_killed_rank_is_made_good_inside_the_job(job: Job, tmp_path: Path) -> None:
    """One command: its ranks are started again from the last checkpoint, and nothing is lost or repeated."""
    with Live([*job.words, f"runs_dir={tmp_path / 'runs'}", "watch.max_restarts=1"]) as live:
        live.until(lambda event: event["event"] == "saved")
        folder = only_run(tmp_path / "runs")
        os.kill(live.rank_pids()[1], signal.SIGKILL)
        restart = live.until(lambda event: event["event"] == "restart")
        saved = [event["iteration"] for event in live.of("saved")]
        assert live.end() == 0, live.stderr()
    assert (restart["rank"], restart["kind"], restart["number"]) == (1, "killed", 1)
    assert restart["from_iteration"] == max(saved)
    assert live.summary["num_restarts"] == 1
    found = state(folder)
    assert (found.status, found.iteration, found.num_restarts) == ("finished", ITERS, 1)
    assert joined_curve(folder) == job.curve
    assert processes_of(folder) == []


@pytest.mark.parametrize("job", [2], indirect=True, ids=["2 ranks"])
def test_ranks_do_not_outlive_a_killed_launcher_and_the_same_command_goes_on(
    job: Job, tmp_path: Path
) -> None:
    words = [*job.words, f"runs_dir={tmp_path / 'runs'}"]
    with Live(words) as live:
        live.until(lambda event: event["event"] == "saved")
        folder = only_run(tmp_path / "runs")
        assert len(processes_of(folder)) >= 2
        live.process.kill()
        await_nobody(folder)
    assert state(folder).status == "running"
    assert newest_whole(folder) >= 5
    finish(job, words, folder)


def stop(live: Live, number: signal.Signals) -> None:
    """A signal to the launcher alone: the ranks are in a group of their own, as under a terminal's Ctrl-C."""
    os.kill(live.process.pid, number)


def test_a_signal_saves_where_the_run_is_and_the_same_command_goes_on_from_there(
    job: Job, tmp_path: Path
) -> None:
    words = [*job.words, f"runs_dir={tmp_path / 'runs'}"]
    reached = 0
    for number, after in ((signal.SIGINT, 7), (signal.SIGTERM, 16)):
        with Live(words) as live:
            live.until_step(after)
            stop(live, number)
            assert live.end() == 128 + number
        assert_resumed(live, reached)
        folder = only_run(tmp_path / "runs")
        found = state(folder)
        reached = found.iteration
        assert (found.status, found.reason) == ("stopped", f"saved after {number.name}")
        assert after <= reached == found.saved_iteration == newest_whole(folder)
        assert joined_curve(folder) == [line for line in job.curve if line[0] <= reached]
        assert processes_of(folder) == []

    # Before the first step there is nothing to save, and nothing is lost.
    with Live(words) as live:
        live.until(lambda event: event["event"] == "header")
        stop(live, signal.SIGINT)
        assert live.end(20.0) == 130
    assert (state(folder).status, newest_whole(folder)) == ("stopped", reached)
    assert processes_of(folder) == []

    # A second signal does not wait for a save.
    with Live([*words, "launch.grace_s=600"]) as live:
        live.until_step(reached + 2)
        os.kill(live.rank_pids()[0], signal.SIGSTOP)  # it cannot hear the first one
        stop(live, signal.SIGINT)
        live.until(lambda event: event["event"] == "stopping")
        stop(live, signal.SIGINT)
        assert live.end(20.0) == 130
    assert "second Ctrl-C" in state(folder).reason
    assert processes_of(folder) == []
    finish(job, words, folder)


def test_a_second_launcher_is_refused_by_name_and_the_first_does_not_notice(job: Job, tmp_path: Path) -> None:
    words = [*job.words, f"runs_dir={tmp_path / 'runs'}"]
    with Live(words) as live:
        live.until_step(2)
        second = train(*words)
        assert second.returncode == 2
        assert f"process {live.process.pid} on " in second.stderr
        assert "hint: " in second.stderr and "Traceback" not in second.stderr
        assert live.process.poll() is None
        assert live.end() == 0, live.stderr()
    assert joined_curve(only_run(tmp_path / "runs")) == job.curve


def test_a_reader_that_goes_away_does_not_end_the_run(job: Job, tmp_path: Path) -> None:
    """As with ``| head`` or a terminal that was closed."""
    words = [*job.words, f"runs_dir={tmp_path / 'runs'}"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120.0) == 0, process.stderr.read()
        assert "Traceback" not in process.stderr.read()
    assert joined_curve(only_run(tmp_path / "runs")) == job.curve
