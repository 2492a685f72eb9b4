"""``launch/train.py --multirun``: which points are run, why not the others, and what is left in the end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finish
from live_command import Live

from megaplug.commands import runs, sweep, sweep_packed, sweep_points, train
from megaplug.commands.attempts import Course
from megaplug.commands.run import End
from megaplug.errors import UserError
from megaplug.job.compose import ConfigSource
from megaplug.job.schema import Job
from megaplug.launchers.restarts import Restarts
from megaplug.launchers.side_by_side import SideBySide, Work
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.verdict import Outcome
from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import read_metrics
from megaplug.runs.state import RunState, write_state

# 12 points: the largest min_lr is above two of the three rates, and the last rate is the first.
TWELVE = ["lr.lr=1e-3,1.5e-3,4e-3,0.001", "lr.min_lr=0,1e-4,2e-3"]
IMPOSSIBLE, REPEATS = {3, 6, 12}, {10: 1, 11: 2}
RUNS = [1, 2, 4, 5, 7, 8, 9]


@pytest.fixture
def words(small_words: list[str]) -> list[str]:
    return small_words


class Started:
    """Stands for the starting of runs: each does all its steps, unless something else is said of it."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.instead: dict[float, Callable[[], End]] = {}
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self, job: Job, command: Any) -> End:
        self.rates.append(job.lr.lr)
        self.meanwhile()
        assert not command.multirun and f"lr.lr={job.lr.lr}" in command.overrides
        if job.lr.lr in self.instead:
            return self.instead[job.lr.lr]()
        finish(job)
        return End(0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    stand_in = Started()
    monkeypatch.setattr(sweep, "start", stand_in)
    return stand_in


def typed(*words: str) -> int:
    return train.main(["--multirun", *words])


def sweep_json(there: Path = Path()) -> dict[str, Any]:
    (file,) = there.glob("runs/sweeps/*/sweep.json")
    return json.loads(file.read_text())


def refuse() -> End:
    raise UserError("another job is using it")


def test_of_twelve_points_seven_are_run_and_five_explained(words, capsys):
    assert typed(*words, *TWELVE, "launch=print", "launch.output=json") == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["num_points"], found["num_runs"], found["num_impossible"], found["num_repeated"]) == (
        12,
        7,
        3,
        2,
    )
    points = {point["number"]: point for point in found["points"]}
    assert {number for number, point in points.items() if point["status"] == "impossible"} == IMPOSSIBLE
    assert {number: point["repeats"] for number, point in points.items() if point["repeats"]} == REPEATS
    assert [number for number, point in points.items() if point["status"] == "new"] == RUNS
    assert "0.002 is above lr.lr = 0.0015" in points[6]["problems"][0]["message"]
    assert points[6]["run"] is None and points[10]["run"] == points[1]["run"]
    assert len({points[number]["run"] for number in RUNS}) == 7
    assert points[2]["own"] == ["lr.lr=0.001", "lr.min_lr=0.0001"] and words[0] in points[2]["words"]
    assert found["gpu_hours_modelled"] is None and found["gpu_hours_unknown"] == RUNS
    assert not Path("runs").exists()


def test_a_list_names_points_folders_reasons_and_cost_and_starts_nothing(words, started, capsys):
    assert typed(*words, "launch=print", "lr.lr=1e-3,-1,-2,0.001") == 2
    said = capsys.readouterr()
    first, *lines = said.out.splitlines()
    assert first == "4 points: 1 run, 2 not possible, 1 that repeats another"
    assert lines[0].split()[:2] == ["1", "new"] and lines[0].split()[2].startswith("runs/small-")
    assert lines[1].split() == ["2", "not", "possible", "lr.lr=-1"]
    assert lines[2].strip() == "lr.lr: must be above 0, but is -1.0"
    assert "as point" not in said.out and "repeats 1" in said.out
    assert lines[-2].endswith("not known, the time of CPU ranks is not modelled")
    assert lines[-1] == "launch=print: nothing was started"
    assert started.rates == [] and not Path("runs").exists()


def test_a_reason_is_said_once(words, capsys):
    assert typed(*words, "launch=print", "model.num_attention_heads=3", "lr.lr=1e-3,2e-3") == 2
    said = capsys.readouterr().out
    assert said.count("attention heads") == 1 and "as point 1" in said


def test_what_decides_no_result_makes_no_run_of_its_own_and_a_name_does(words):
    swept = [*words, "name=one,two", "logging.level=debug,info"]
    found = sweep_points.check_points(swept, ConfigSource())
    assert [point.repeats for point in found.all] == [None, 1, None, 3]


def test_one_sweep_has_one_folder_in_whatever_order_it_is_typed(words):
    folders = {
        str(sweep_points.check_points([*words, word], ConfigSource()).folder)
        for word in ("lr.lr=1e-3,2e-3", "lr.lr=2e-3,-1,0.001")
    }
    assert len(folders) == 1 and folders.pop().startswith("runs/sweeps/")


@pytest.mark.parametrize("word", ["runs_dir=a,b", "launch=local,print", "launch.output=text,json"])
def test_what_is_the_whole_sweep_s_has_one_value(word, words, started, capsys):
    assert typed(*words, word) == 2
    assert "one for the whole sweep" in capsys.readouterr().err and started.rates == []


def test_hours_are_those_of_the_steps_that_are_left(words):
    there = [*words, "cluster=h100", "device=auto", "launch=print", "topology.dp=2", "lr.lr=1e-3"]
    (whole,) = sweep_points.check_points(there, ConfigSource()).left
    assert whole.gpu_hours is not None and whole.gpu_hours > 0
    folder = RunFolder(whole.folder.path)
    folder.path.mkdir(parents=True)
    write_state(folder.state_file, RunState("stopped", 3, 1, 4))
    (rest,) = sweep_points.check_points(there, ConfigSource()).left
    assert rest.gpu_hours == pytest.approx(0.75 * whole.gpu_hours)
    (short,) = sweep_points.check_points([*there, "train.stop_at=2"], ConfigSource()).left
    assert short.gpu_hours == pytest.approx(0.25 * whole.gpu_hours)
    assert sweep_points.check_points([*there, "train.stop_at=1"], ConfigSource()).left == []


def test_a_costly_sweep_is_started_only_with_the_word_that_it_names(words, started, capsys, monkeypatch):
    swept = [*words, "lr.lr=1e-3,2e-3"]
    monkeypatch.setattr(sweep_points, "_hours", lambda *_: (60.25, ""))
    assert typed(*swept) == 2
    said = capsys.readouterr().err
    assert "the 2 runs that are left need 120 GPU-hours (modelled): more than 100" in said
    assert "launch.max_gpu_hours=121 starts them" in said
    assert started.rates == [] and not Path("runs").exists()
    started.instead = {2e-3: lambda: End(1)}
    assert typed(*swept, "launch.max_gpu_hours=121") == 1
    # What is finished costs nothing more.
    assert typed(*swept) == 1
    assert started.rates == [1e-3, 2e-3, 2e-3]


@pytest.mark.parametrize(("limit", "is_named"), [("100", True), ("121", False), ("null", False)])
def test_a_list_names_the_word_that_starts_a_costly_sweep(limit, is_named, words, capsys, monkeypatch):
    monkeypatch.setattr(sweep_points, "_hours", lambda *_: (60.25, ""))
    assert typed(*words, "lr.lr=1e-3,2e-3", "launch=print", f"launch.max_gpu_hours={limit}") == 0
    assert ("launch.max_gpu_hours=121 starts it" in capsys.readouterr().out) == is_named


def test_what_is_known_of_the_cost_is_counted_and_the_rest_is_named(words, started, capsys, monkeypatch):
    def of(job: Job, *_: Any) -> tuple[float | None, str]:
        return (None, "nobody knows") if job.lr.lr == 2e-3 else (1.5, "")

    monkeypatch.setattr(sweep_points, "_hours", of)
    assert typed(*words, "lr.lr=1e-3,2e-3,3e-3", "launch=print") == 0
    assert "3.00 (modelled), without point 2: nobody knows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("instead", "code", "runs"),
    [
        ({}, 0, 3),
        ({2e-3: lambda: End(1)}, 1, 3),
        ({2e-3: refuse}, 2, 3),
        ({2e-3: lambda: End(130, signal.SIGINT)}, 130, 2),
        ({2e-3: lambda: End(140, signal.SIGUSR2)}, 140, 2),
        # It came when the run had nothing left to stop.
        ({2e-3: lambda: End(0, signal.SIGUSR2)}, 140, 2),
        ({2e-3: lambda: End(1, signal.SIGTERM)}, 1, 2),
    ],
    ids=["all finish", "one fails", "one is refused", "Ctrl-C", "SIGUSR2", "too late", "fails and SIGTERM"],
)
def test_a_failure_stops_no_other_run_and_a_signal_stops_all(instead, code, runs, words, started, capsys):
    started.instead = instead
    assert typed(*words, "lr.lr=1e-3,2e-3,3e-3") == code
    assert started.rates == [1e-3, 2e-3, 3e-3][:runs]
    said = capsys.readouterr().out
    good = 3 if code == 0 else 2 if runs == 3 else 2 if instead[2e-3]().exit_code == 0 else 1
    assert f"{good} of 3 runs are finished" in said
    assert ("--multirun" in said.splitlines()[-1]) == (good < 3)


def test_a_point_that_cannot_be_is_no_failure_and_a_failure_counts_more(words, started):
    assert typed(*words, "lr.lr=1e-3,-1") == 2
    started.instead = {2e-3: lambda: End(1)}
    assert typed(*words, "lr.lr=2e-3,-1") == 1


def test_where_no_point_can_be_run_all_are_explained(words, started, capsys):
    assert typed(*words, "lr.lr=-1,-2") == 2
    said = capsys.readouterr()
    assert "none of the 2 points can be run" in said.err and "must be above 0, but is -2.0" in said.out
    assert typed(*words, "lr.lr=a,b", "launch.output=json") == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["num_impossible"] == 2
    assert not Path("runs").exists()


def test_the_same_command_runs_only_what_is_missing_and_compares_all(words, started, capsys):
    swept = [*words, "lr.lr=1e-3,2e-3,3e-3"]
    started.instead = {2e-3: lambda: End(1), 3e-3: lambda: End(130, signal.SIGINT)}
    assert typed(*swept) == 130
    found = sweep_json()
    assert [point["status"] for point in found["points"]] == ["finished", "new", "new"]
    # Of one run there is nothing to compare.
    assert found["comparison"] is None and not list(Path().glob("runs/sweeps/*/comparison.png"))
    capsys.readouterr()
    started.rates, started.instead = [], {}
    assert typed(*swept) == 0
    assert started.rates == [2e-3, 3e-3]
    said = capsys.readouterr().out
    assert "1 of 3 are finished already" in said and "point 2 of 3: lr.lr=0.002" in said
    table = said[said.index("run  ") :].splitlines()
    assert table[0].split()[-1] == "lr.lr" and [row.split()[-1] for row in table[1:4]] == [
        "0.001",
        "0.002",
        "0.003",
    ]
    found = sweep_json()
    assert [point["status"] for point in found["points"]] == ["finished"] * 3
    assert Path(found["comparison"]["picture"]).read_bytes().startswith(b"\x89PNG")
    assert found["comparison"]["differing"] == ["lr.lr"]
    assert typed(*swept) == 0 and started.rates == [2e-3, 3e-3]


def test_resume_false_starts_all_over(words, started):
    assert typed(*words, "lr.lr=1e-3,2e-3") == 0
    assert typed(*words, "lr.lr=1e-3,2e-3", "resume=false") == 0
    assert started.rates == [1e-3, 2e-3] * 2
    assert len(list(Path("runs").glob("small-*-2"))) == 2


def test_a_sweep_tells_a_program_what_it_does_line_by_line(words, started, capsys):
    started.instead = {2e-3: refuse}
    assert typed(*words, "lr.lr=1e-3,2e-3,-1", "launch.output=json") == 2
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["sweep", "point", "point", "sweep_end"]
    assert [(event["number"], event["run"], event["num_runs"]) for event in events[1:3]] == [
        (1, 1, 2),
        (2, 2, 2),
    ]
    assert events[-1]["exit_code"] == 2
    assert [point["reason"] for point in events[-1]["points"]] == ["", "another job is using it", ""]


def test_a_sweep_s_folder_is_not_taken_for_a_run(words, started, capsys):
    assert typed(*words, "lr.lr=1e-3,2e-3") == 0
    capsys.readouterr()
    assert runs.main(["output=json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2


def test_a_sweep_is_run_by_one_command_at_a_time(words, started, capsys):
    swept, codes = [*words, "lr.lr=1e-3,2e-3"], []

    started.meanwhile = lambda: codes.append(typed(*swept))
    assert typed(*swept) == 0
    said = capsys.readouterr().err
    assert codes == [2, 2] and started.rates == [1e-3, 2e-3]
    assert "another job is using runs/sweeps/" in said and "or name=... makes runs" in said


def test_where_no_sweep_can_be_written_down_no_run_is_started(words, started, capsys):
    Path("runs").mkdir()
    Path("runs/sweeps").touch()
    assert typed(*words, "lr.lr=1e-3,2e-3") == 2
    assert "cannot make runs/sweeps/" in capsys.readouterr().err and not started.rates


def test_a_disk_that_takes_no_sweep_json_later_on_ends_no_run(words, started, capsys):
    def refuse_files() -> None:
        (folder,) = Path("runs/sweeps").iterdir()
        for name in ("sweep.json", "comparison.png"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).mkdir()
        started.meanwhile = lambda: None

    started.meanwhile = refuse_files
    assert typed(*words, "lr.lr=1e-3,2e-3") == 0
    said = capsys.readouterr().err
    assert started.rates == [1e-3, 2e-3]
    assert "no sweep.json: " in said and "no comparison: " in said and "Traceback" not in said


def test_a_sweep_can_be_frozen(words, capsys):
    assert typed(*words, "lr.lr=1e-3,2e-3", "launch=freeze") == 0
    assert "2 of 2 runs are frozen" in capsys.readouterr().out
    assert len(list(Path("runs").glob("small-*/job.yaml"))) == 2


def test_a_signal_that_comes_too_late_for_a_run_ends_the_sweep(words, monkeypatch, capsys):
    class Late:
        def __init__(self, *_: Any) -> None:
            pass

        def run(self, *_: Any) -> Course:
            os.kill(os.getpid(), signal.SIGUSR2)
            return Course(Outcome("finished", 4, 4), Restarts(0))

    monkeypatch.setattr("megaplug.commands.run.Attempts", Late)
    assert typed(*words, "lr.lr=1e-3,2e-3") == 128 + signal.SIGUSR2
    said = capsys.readouterr().out
    assert "1 of 2 runs are finished" in said and "point 2 of 2" not in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_points_are_run_interrupted_and_repeated(words, tmp_path):
    swept = [*words, *TWELVE, f"runs_dir={tmp_path / 'runs'}", "checkpoint.save_interval=2", "train.iters=6"]
    with Live(["--multirun", *swept]) as live:
        # Three runs are whole, the fourth is in its midst.
        live.until(lambda event: event["event"] == "point" and event["run"] == 4, 300)
        live.until_step(2)
        live.process.send_signal(signal.SIGINT)
        assert live.end() == 130
    found = sweep_json(tmp_path)
    by_number = {point["number"]: point for point in found["points"]}
    statuses = [by_number[number]["status"] for number in RUNS]
    assert statuses == ["finished"] * 3 + ["stopped"] + ["new"] * 3
    assert found["comparison"] is not None
    before = {number: steps_of(by_number[number]) for number in RUNS[:3]}

    with Live(["--multirun", *swept]) as again:
        assert again.end(600) == 2, again.stderr()
    assert [event["number"] for event in again.of("point")] == RUNS[3:]
    (header, *_) = again.of("header")
    assert header["resumes"].startswith("from step ")
    found = again.of("sweep_end")[0]
    assert found == {"event": "sweep_end", "exit_code": 2} | sweep_json(tmp_path)
    by_number = {point["number"]: point for point in found["points"]}
    assert {by_number[number]["status"] for number in RUNS} == {"finished"}
    assert {number: steps_of(by_number[number]) for number in RUNS[:3]} == before
    assert all([step for step, _ in steps_of(by_number[number])] == list(range(1, 7)) for number in RUNS)
    assert {number for number, point in by_number.items() if point["status"] == "impossible"} == IMPOSSIBLE
    compared = found["comparison"]
    assert len(compared["runs"]) == 7 and compared["differing"] == ["lr.lr", "lr.min_lr"]
    assert Path(compared["picture"]).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "runs").glob("small-*"))) == 7


def steps_of(point: dict[str, Any]) -> list[tuple[int, float]]:
    """Step and loss of all that a point's run has recorded."""
    lines = read_metrics(RunFolder(Path(point["run"])).metrics_file)
    return [(line["iteration"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_side_by_side_are_told_apart_interrupted_and_finished(words, tmp_path):
    places = f"runs_dir={tmp_path / 'runs'}"
    swept = [*words, "lr.lr=1e-3,2e-3,4e-3", "launch.at_once=2", places, "train.iters=400"]
    with Live(["--multirun", *swept]) as live:
        seen: set[int] = set()

        def both_train(event: dict[str, Any]) -> bool:
            seen.update([event["point"]] if event["event"] == "step" else [])
            return seen == {1, 2}

        live.until(both_train, 300)
        live.process.send_signal(signal.SIGINT)
        assert live.end() == 130
    assert [point["status"] for point in sweep_json(tmp_path)["points"]] == ["stopped", "stopped", "new"]
    with Live(["--multirun", *swept, "train.stop_at=60"]) as again:
        assert again.end(600) == 0, again.stderr()
    points = sweep_json(tmp_path)["points"]
    for point in points:
        steps = [step for step, _ in steps_of(point)]
        assert len(steps) >= 60 and steps == list(range(1, len(steps) + 1))


def test_of_runs_side_by_side_a_person_sees_a_line_now_and_then(capsys):
    packed = sweep_packed.Packed(sweep_points.Points(()), False, lambda _: None, lambda _: None)
    step = {"event": "step", "iteration": 3, "loss": 2.5, "tokens_per_second": 1234.0}
    packed._said(2, json.dumps(step))
    packed._said(2, json.dumps({**step, "iteration": 4}))
    packed._said(3, json.dumps({"event": "phase", "name": "training"}))
    packed._said(3, json.dumps({"event": "note", "text": "resumes"}))
    summary = {"event": "summary", "status": "failed", "iteration": 1, "iters": 9, "reason": "why"}
    packed._said(3, json.dumps(summary))
    packed._said(3, "error: another job is using it")
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "point 2  step 3  loss 2.5000  1.23k tokens/s",
        "point 3  resumes",
        "point 3  failed at step 1 of 9: why",
    ]
    assert said.err == "point 3  error: another job is using it\n"


def test_a_layout_for_the_whole_machine_is_not_run_beside_others(words, capsys, monkeypatch):
    auto = [*words, "topology=auto", "topology.world_size=1", "train.seed=1,2", "launch.at_once=2"]
    assert typed(*auto) == 2
    assert "leaves no room for other runs" in capsys.readouterr().err


def test_each_run_side_by_side_is_started_with_the_flags_of_the_sweep(words, tmp_path, monkeypatch):
    (tmp_path / "own" / "lr").mkdir(parents=True)
    (tmp_path / "own" / "lr" / "mine.yaml").write_text("defaults:\n  - cosine\n  - _self_\nlr: 3.0e-3\n")
    works: list[Work] = []

    def run(self: SideBySide, given: list[Work], signals: object) -> dict[int, int]:
        works.extend(given)
        return {work.number: 0 for work in given}

    monkeypatch.setattr(SideBySide, "run", run)
    own = ["--config-dir", "own", *words, "lr=mine", "train.seed=1,2", "launch.at_once=2"]
    assert typed(*own) == 0
    for number, work in enumerate(works, start=1):
        assert work.words[1:3] == ("--config-dir", "own") and work.words[-1] == "launch.output=json"
        assert f"train.seed={number}" in work.words and "--multirun" not in work.words


def test_a_signal_before_any_run_side_by_side_was_started_ends_the_sweep(words, monkeypatch, capsys):
    def run(self: SideBySide, given: list[Work], signals: StopSignals) -> dict[int, int]:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked
        return {}

    monkeypatch.setattr(SideBySide, "run", run)
    assert typed(*words, "train.seed=1,2", "launch.at_once=2") == 128 + signal.SIGTERM
    assert "0 of 2 runs are finished" in capsys.readouterr().out
