"""``sweep=optuna``: what is proposed, run, passed over and kept, and where it goes on."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finish

from megaplug.commands import sweep, sweep_points, train
from megaplug.commands.proposals import Tried, propose
from megaplug.commands.run import End
from megaplug.job.compose import ConfigSource, compose_job, sweep_space
from megaplug.job.schema import Job, SweepConfig
from megaplug.job.sweep_space import Space
from megaplug.launchers.side_by_side import SideBySide, Work

RATE = "lr.lr=tag(log,interval(3e-4,1e-1))"
BEST_RATE = 3e-3


@pytest.fixture
def words(small_words: list[str]) -> list[str]:
    """Words for small jobs whose runs go below the current folder, and what is open of them."""
    study = ["sweep=optuna", "sweep.trials=4", "sweep.startup_trials=2", "train.eval_iters=1"]
    return [*small_words, *study, RATE]


def loss_of(job: Job) -> float:
    """Lowest at `BEST_RATE`."""
    return 1 + math.log10(job.lr.lr / BEST_RATE) ** 2


class Started:
    """Stands for the starting of runs, each of which comes to its end."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.instead: dict[int, int | Exception] = {}
        self.metric = "valid_loss"
        self.of_sweep: list[str] = []

    def __call__(self, job: Job, command: Any) -> End:
        self.rates.append(job.lr.lr)
        of_sweep = [word for word in command.overrides if word.startswith("sweep")]
        assert not command.multirun and of_sweep == self.of_sweep
        if code := self.instead.pop(len(self.rates), None):
            if isinstance(code, Exception):
                raise code
            return End(code)
        finish(job, **{self.metric: loss_of(job)})
        return End(0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    stand_in = Started()
    monkeypatch.setattr(sweep, "start", stand_in)
    return stand_in


def typed(*words: str) -> int:
    return train.main(["--multirun", *words])


def sweep_json() -> dict[str, Any]:
    (file,) = Path().glob("runs/sweeps/*/sweep.json")
    return json.loads(file.read_text())


def space_of(*words: str) -> Space:
    return sweep_space(words, ConfigSource())


def test_proposals_come_nearer_to_the_best_than_chance(words):
    """Median over ten seeds of the best of 25 points in two dimensions."""
    space = space_of(RATE, "lr.min_lr=interval(0,1e-4)")

    def best(startup_trials: int, seed: int) -> float:
        config = SweepConfig(kind="optuna", startup_trials=startup_trials, seed=seed)
        tried: list[Tried] = []
        for _ in range(25):
            chosen = propose(space, tried, config)
            rate, least = float(chosen["lr.lr"]), float(chosen["lr.min_lr"])
            tried.append(Tried(chosen, math.log10(rate / BEST_RATE) ** 2 + (least * 1e4 - 0.3) ** 2))
        return min(each.value for each in tried if each.value is not None)

    by_chance = statistics.median(best(25, seed) for seed in range(10))
    assert statistics.median(best(8, seed) for seed in range(10)) < 0.5 * by_chance


def test_what_is_proposed_lies_in_the_space_and_is_typed_as_its_key_takes_it():
    group = "model=tiny,tiny_llama3_50m"
    group = "model=tiny,tiny_llama3_50m"
    space = space_of(RATE, "train.seed=interval(2,9)", "model.num_layers=range(1,9,2)", group)
    tried: list[Tried] = []
    for number in range(40):
        chosen = propose(space, tried, SweepConfig(startup_trials=5))
        space.check(chosen)
        if number < 4:
            job = compose_job([f"{key}={value}" for key, value in chosen.items()])
            assert 3e-4 <= job.lr.lr <= 1e-1 and job.model.num_layers in (1, 3, 5, 7)
            assert 2 <= job.train.seed <= 9
        tried.append(Tried(chosen, float(number % 7)))
    assert len({each.chosen["lr.lr"] for each in tried}) == 40
    for key, least in (("train.seed", 4), ("model.num_layers", 3), ("model", 2)):
        assert len({each.chosen[key] for each in tried}) >= least
    # By its logarithm: evenly drawn, one of forty would be.
    low = [each for each in tried if float(each.chosen["lr.lr"]) < 3e-3]
    assert 5 <= len(low) <= 30


def test_the_same_is_proposed_after_the_same_results_and_other_points_by_another_seed():
    space, one = space_of(RATE), SweepConfig(startup_trials=2)
    tried = [Tried({"lr.lr": text}, float(text)) for text in ("0.01", "0.03", "0.002")]
    assert propose(space, tried, one) == propose(space, tried, one)
    assert propose(space, tried, one) != propose(space, tried, SweepConfig(startup_trials=2, seed=1))
    assert propose(space, tried[:1], one) != propose(space, [], one)


def test_points_that_cannot_be_are_kept_away_from():
    space, config = space_of(RATE), SweepConfig(startup_trials=4)
    tried: list[Tried] = []
    for _ in range(30):
        chosen = propose(space, tried, config)
        rate = float(chosen["lr.lr"])
        # The higher the better, up to where nothing is possible any more.
        tried.append(Tried(chosen, None if rate > 1e-2 else -math.log10(rate)))
    later = [float(each.chosen["lr.lr"]) for each in tried[15:]]
    # Seven here, five to seven with other seeds; all fifteen where nothing is told of them.
    assert sum(rate > 1e-2 for rate in later) <= 9


def test_a_study_runs_what_is_proposed_and_tells_the_best(words, started, capsys):
    assert typed(*words) == 0
    said = capsys.readouterr().out
    found = sweep_json()
    study = found["study"]
    assert len(started.rates) == found["num_points"] == len(study["values"]) == 4
    best = min(range(4), key=lambda place: study["values"][place])
    assert study["best"] == best + 1
    assert study["values"][best] == pytest.approx(1 + math.log10(started.rates[best] / BEST_RATE) ** 2)
    assert f"best  point {best + 1:>3}" in said and "4 of 4 runs are finished" in said
    assert "point 3 of 4: lr.lr=" in said and "the best so far is point" in said
    (folder,) = Path("runs/sweeps").iterdir()
    assert (folder / "slices.png").read_bytes().startswith(b"\x89PNG") and (
        folder / "comparison.png"
    ).is_file()


def test_the_metric_is_the_one_that_was_asked_for(words, started, capsys):
    started.metric = "loss"
    assert typed(*words) == 1
    assert "has no validation loss" in capsys.readouterr().err
    assert typed(*words, "sweep.metric=loss") == 0
    assert "training loss" in capsys.readouterr().out
    # A sweep by another metric is another one.
    assert len(list(Path("runs/sweeps").iterdir())) == 2


@pytest.mark.slow
def test_a_study_that_was_interrupted_goes_on_as_if_it_had_not_been(words, started, capsys):
    assert typed(*words) == 0
    undisturbed = sweep_json()["study"]
    Path("runs").rename("before")
    started.rates, started.instead = [], {3: 130}
    assert typed(*words) == 130
    said = capsys.readouterr().out
    assert len(started.rates) == 3 and "next" in said and "3 of 4 points were tried" in said
    assert len(sweep_json()["study"]["chosen"]) == 3
    assert typed(*words) == 0
    # The third, which was broken off, and the one that was missing.
    assert len(started.rates) == 5 and started.rates[3] == started.rates[2]
    assert sweep_json()["study"] == undisturbed
    assert typed(*words) == 0 and len(started.rates) == 5
    # More of them go on from there.
    assert typed(*words, "sweep.trials=5") == 0 and len(started.rates) == 6
    assert sweep_json()["study"]["values"][:4] == undisturbed["values"]
    assert typed(*words, "resume=false", "sweep.trials=1") == 0 and len(started.rates) == 7


def test_what_another_version_of_optuna_has_proposed_is_not_proposed_anew(words, started, monkeypatch):
    started.instead = {2: 130}
    assert typed(*words) == 130
    chosen = sweep_json()["study"]["chosen"]
    monkeypatch.setattr(
        "megaplug.commands.sweep_study.propose", lambda space, tried, config: {"lr.lr": f"0.0{len(tried)}1"}
    )
    assert typed(*words) == 0
    assert sweep_json()["study"]["chosen"] == [
        *chosen, *({"lr.lr": f"0.0{number}1"} for number in range(2, 4)),
    ]  # fmt: skip


def test_a_run_that_fails_is_no_end_and_is_tried_again(words, started, capsys):
    started.instead = {2: 1}
    assert typed(*words) == 1
    assert sweep_json()["study"]["values"][1] is None and len(started.rates) == 4
    assert "failed: point 2" in capsys.readouterr().out
    assert typed(*words) == 0 and len(started.rates) == 5
    assert sweep_json()["study"]["values"][1] is not None


def test_points_that_are_not_possible_are_passed_over_with_their_reason(words, started, capsys):
    assert typed(*words, "lr.min_lr=1e-3") == 0
    said = capsys.readouterr().out
    assert "is not possible" in said and "lr.min_lr: 0.001 is above lr.lr" in said
    found = sweep_json()
    assert 0 < found["num_impossible"] < 4 and len(started.rates) == 4 - found["num_impossible"]
    assert typed(*words, "lr.min_lr=1") == 2


def test_what_is_drawn_twice_is_run_once(words, started, capsys):
    assert typed(*words[:-1], "train.seed=1,2") == 0
    assert len(started.rates) == 2 and sweep_json()["num_repeated"] == 2
    assert "repeats point" in capsys.readouterr().out
    assert all(value is not None for value in sweep_json()["study"]["values"])


def test_a_study_that_costs_too_much_is_not_begun_and_the_word_that_begins_it_is_told(
    words, started, monkeypatch, capsys
):
    monkeypatch.setattr(sweep_points, "_hours", lambda *_: (2.0, ""))
    assert typed(*words, "launch.max_gpu_hours=7") == 2
    assert "launch.max_gpu_hours=8 starts them" in capsys.readouterr().err and started.rates == []
    assert typed(*words, "launch.max_gpu_hours=8") == 0 and len(started.rates) == 4


def test_later_points_that_cost_more_end_a_study_with_what_it_has(words, started, monkeypatch, capsys):
    monkeypatch.setattr(sweep_points, "_hours", lambda *_: (2.0 if len(started.rates) < 2 else 2.4, ""))
    assert typed(*words, "launch.max_gpu_hours=8.5") == 2
    said = capsys.readouterr()
    assert len(started.rates) == 2 and "launch.max_gpu_hours" in said.err and "best  point" in said.out


def test_points_of_a_study_are_run_side_by_side(words, monkeypatch, capsys):
    together: list[int] = []

    def run(self: SideBySide, given: list[Work], signals: object) -> dict[int, int]:
        together.append(len(given))
        for work in given:
            job = compose_job([word for word in work.words[1:] if not word.startswith("launch.output")])
            finish(job, valid_loss=loss_of(job))
        return {work.number: 0 for work in given}

    monkeypatch.setattr(SideBySide, "run", run)
    assert typed(*words, "launch.at_once=3") == 0
    assert together == [3, 1]
    assert len(set(sweep_json()["study"]["values"])) == 4
    # One that repeats another of the same four has its value, too.
    shutil.rmtree("runs")
    assert typed(*words[:-1], "train.seed=1,2", "launch.at_once=4") == 0
    assert together[2:] == [2] and None not in sweep_json()["study"]["values"]


def test_a_study_that_a_configuration_of_one_s_own_chooses_has_points_that_can_be_run(words, started):
    for name, hidden in (("one", 64), ("two", 32)):
        own = Path(name, "experiment")
        own.mkdir(parents=True)
        lines = [
            "# @package _global_",
            "defaults:",
            "  - override /sweep: optuna",
            f"model: {{hidden_size: {hidden}}}",
        ]
        (own / "mine.yaml").write_text("\n".join(lines) + "\n")
    chosen = [word for word in words if word != "sweep=optuna"]
    started.of_sweep = ["sweep.kind=grid"]
    for name in ("one", "two"):
        assert typed("--config-dir", name, *chosen, "experiment=mine") == 0
    for file in Path().glob("runs/sweeps/*/sweep.json"):
        for point in json.loads(file.read_text())["points"]:
            # As a child of a sweep side by side composes it.
            assert compose_job(point["words"], ConfigSource(extra_dir=Path("one"))).sweep.kind == "grid"
    # One folder's study does not go on with what was tried for the other's.
    assert len(list(Path("runs/sweeps").iterdir())) == 2


def test_a_signal_between_two_points_ends_a_study(words, monkeypatch, capsys):
    ended: list[Job] = []

    def end(job: Job, command: Any) -> End:
        finish(job, valid_loss=loss_of(job))
        ended.append(job)
        return End(0, signal.SIGTERM)

    monkeypatch.setattr(sweep, "start", end)
    assert typed(*words) == 128 + signal.SIGTERM
    assert len(ended) == 1 and "next" in capsys.readouterr().out


def test_a_program_reads_a_study_line_by_line(words, started, capsys):
    assert typed(*words, "lr.min_lr=1e-3", "launch.output=json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "sweep" and kinds[-1] == "sweep_end"
    assert {"point", "value", "passed_over"} <= set(kinds)
    assert events[-1]["study"]["best"] == [e for e in events if e["event"] == "value"][-1]["best"]


def test_what_would_be_next_can_be_seen_first(words, started, capsys):
    assert typed(*words, "launch=print") == 0
    said = capsys.readouterr().out
    assert "1 point: 1 run" in said and "then 3 more" in said and not Path("runs").exists()
    assert typed(*words, "launch=print", "launch.output=json") == 0
    proposed = json.loads(capsys.readouterr().out)["study"]["chosen"]
    assert typed(*words) == 0 and sweep_json()["study"]["chosen"][:1] == proposed
    assert typed(*words, "launch=print") == 0
    assert "4 of 4 are finished already" in capsys.readouterr().out


def test_a_damaged_file_of_a_study_is_one_message(words, started, capsys):
    words = [*words, "sweep.trials=1"]
    assert typed(*words) == 0
    (file,) = Path().glob("runs/sweeps/*/sweep.json")
    for text in ("{", "[]", file.read_text().replace('"chosen": [', '"chosen": [{"lr.lr": "7"},')):
        file.write_text(text)
        assert typed(*words) == 1
        said = capsys.readouterr().err
        assert "cannot be read" in said and "resume=false" in said and "Traceback" not in said
    assert typed(*words, "resume=false") == 0


def test_without_optuna_it_is_told_how_to_install_it(words, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "optuna" else there(name, *more)
    )
    assert typed(*words) == 2
    assert 'pip install "optuna>=4"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("lr.lr=interval(2,1)", "holds no numbers"),
        ("lr.lr=tag(log,interval(0,1))", "no logarithm"),
        ("lr.lr=tag(lin,interval(1,2))", "there is no tag 'lin'"),
        ("train.seed=interval(1.5,3)", "no whole numbers"),
        ("model=interval(1,2)", "this is a group"),
        ("experiment=interval(1,2)", "this is a group"),
        ("lr.lrr=interval(1,2)", "did you mean lr.lr?"),
        ("lr.lr=1e-3", "no key is left open"),
        ("train.eval_iters=0", "no validation loss to go by"),
        ("launch=slurm", "waits for none"),
        ("launch=freeze", "waits for none"),
        ("sweep.trials=0", "sweep.trials"),
        ("sweep.metric=accuracy", "sweep.metric"),
    ],
)
def test_a_word_that_cannot_be_searched_is_one_message(words, started, capsys, wrong, said):
    rest = words[:-1] if wrong.startswith("lr.lr=") else words
    assert typed(*rest, wrong) == 2
    assert said in capsys.readouterr().err and started.rates == [] and not Path("runs").exists()


def test_an_interval_is_for_optuna_and_optuna_for_many_runs(words, capsys):
    assert typed(*[word for word in words if word != "sweep=optuna"]) == 2
    assert "sweep=optuna chooses in an interval" in capsys.readouterr().err
    assert train.main(words[:-1]) == 2
    assert "--multirun" in capsys.readouterr().err


@pytest.mark.slow
def test_three_real_runs_are_compared_and_the_best_is_the_one_with_the_lowest_loss(words, capsys):
    more = ["sweep.trials=3", "train.iters=6", "train.eval_iters=1", "logging=quiet"]
    assert typed(*words, *more) == 0
    values = sweep_json()["study"]["values"]
    assert len(set(values)) == 3 and sweep_json()["study"]["best"] == values.index(min(values)) + 1
