"""What a sweep outlives: an output that takes nothing more, a disk that refuses, runs that are killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytest
from finished_runs import finish

from megaplug.commands import cli, sweep, sweep_packed, sweep_points, train
from megaplug.commands.run import End
from megaplug.job.compose import compose_job
from megaplug.job.schema import Job
from megaplug.launchers.side_by_side import SideBySide, Work
from megaplug.runs.state import RunState, write_state


@pytest.fixture
def words(small_words: list[str]) -> list[str]:
    """Words for two small runs, which go below the current folder."""
    return [*small_words, "lr.lr=1e-3,2e-3"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Runs do all their steps at once; what is put here is done while the first of them goes on."""
    meanwhile: list[Callable[[], None]] = []

    def start(job: Job, command: Any) -> End:
        while meanwhile:
            meanwhile.pop()()
        finish(job)
        return End(0)

    monkeypatch.setattr(sweep, "start", start)
    return meanwhile


def typed(*words: str) -> int:
    return train.main(["--multirun", *words])


def full() -> TextIO:
    """An output whose disk takes nothing more."""
    return Path("/dev/full").open("w")


def points() -> list[dict[str, Any]]:
    (file,) = Path().glob("runs/sweeps/*/sweep.json")
    return json.loads(file.read_text())["points"]


def statuses() -> list[str]:
    return [point["status"] for point in points()]


@pytest.mark.parametrize("is_json", [True, False])
def test_an_output_that_is_full_ends_no_runs_side_by_side(is_json, monkeypatch):
    packed = sweep_packed.Packed(sweep_points.Points(()), is_json, lambda _: None, lambda _: None)
    with full() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        packed._said(2, json.dumps({"event": "note", "text": "resumes"}))


@pytest.mark.parametrize("output", ["text", "json"])
def test_an_output_that_is_full_ends_no_runs_that_are_left(output, words, started, monkeypatch):
    with full() as stdout:
        started.append(lambda: monkeypatch.setattr(sys, "stdout", stdout))
        assert typed(*words, f"launch.output={output}") == 0
    assert statuses() == ["finished", "finished"]


@pytest.mark.parametrize("to", ["stdout", "stderr"])
def test_only_the_output_that_takes_nothing_more_is_given_up(to, tmp_path, monkeypatch):
    other = "stderr" if to == "stdout" else "stdout"
    with full() as taken, (tmp_path / "seen").open("w") as seen:
        monkeypatch.setattr(sys, to, taken)
        monkeypatch.setattr(sys, other, seen)
        for _ in range(2):
            cli.tell(lambda text: print(text, file=taken, flush=True), "lost")
            cli.tell(lambda text: print(text, file=seen, flush=True), "seen")
    assert (tmp_path / "seen").read_text() == "seen\nseen\n"


@pytest.mark.parametrize("code", [137, 143, 1])
def test_a_run_that_is_killed_beside_others_has_failed(code, words, started, monkeypatch, capsys):
    def run(self: SideBySide, given: list[Work], signals: object) -> dict[int, int]:
        first, second = given
        sweep.start(compose_job([word for word in first.words[1:] if "launch." not in word]), None)
        return {first.number: 0, second.number: code}

    monkeypatch.setattr(SideBySide, "run", run)
    assert typed(*words, "launch.at_once=2") == 1
    assert "1 of 2 runs are finished; failed: point 2" in capsys.readouterr().out


def test_why_a_run_beside_others_was_refused_is_kept(words, monkeypatch, capsys):
    def run(self: SideBySide, given: list[Work], signals: object) -> dict[int, int]:
        self._said(1, "error: another job is using it")
        self._said(2, "error: another job is using that one")
        return {1: 2, 2: 2}

    monkeypatch.setattr(SideBySide, "run", run)
    assert typed(*words, "launch.at_once=2") == 2
    assert [point["reason"] for point in points()] == [
        "another job is using it",
        "another job is using that one",
    ]
    assert "failed: points 1, 2" in capsys.readouterr().out


def test_a_finished_sweep_on_a_disk_that_takes_nothing_is_compared_and_none_is_run(words, started, capsys):
    assert typed(*words) == 0
    (folder,) = Path("runs/sweeps").iterdir()
    (folder / "lock").unlink()
    (folder / "lock").mkdir()
    assert typed(*words) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out
    (point, _) = points()
    write_state(Path(point["run"]) / "state.json", RunState("stopped", 2, 2, 4))
    assert typed(*words) == 2
    assert "cannot open the lock" in capsys.readouterr().err
