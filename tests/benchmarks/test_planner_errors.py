"""The error report: statistics worked out by hand, groups that are ranked, and the whole on a naive model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import planner_errors
from benchmarks.planner_errors import (
    Compared,
    by_constants,
    by_kind,
    by_table,
    compare,
    ranking,
    report,
    statistics_of,
)
from benchmarks.published.gpt import sc21, vtrain
from benchmarks.published.record import Measured


def constant_efficiency(measured: Measured) -> tuple[float, bool, str]:
    """FLOPs at 44 % of an A100's peak and the bubble: what the planner must beat."""
    workload = measured.workload
    flops = measured.flops_per_token * workload.tokens_per_step / workload.topology.world_size
    bubble = (workload.topology.pp - 1) / (workload.num_microbatches * (workload.topology.vpp or 1))
    return flops / (0.44 * 312e12) * (1 + bubble), measured.row_id.startswith("line 2"), "naive"


def off_by(*errors: float) -> list[Compared]:
    rows = vtrain()[: len(errors)]
    return [
        Compared(row, row.seconds * (1 + error), False, "naive")
        for row, error in zip(rows, errors, strict=True)
    ]


def test_statistics_by_hand():
    found = statistics_of(off_by(-0.1, 0.2, -0.3, 0.4, 0.0))
    assert found == pytest.approx(
        {"rows": 5, "mean": 0.2, "median": 0.2, "p90": 0.36, "max": 0.4, "bias": 0.04}, abs=1e-12
    )
    assert statistics_of(off_by(0.5))["p90"] == pytest.approx(0.5)


def test_rows_that_constants_were_fitted_on_are_told_and_kept_out_of_the_error():
    compared = compare(sc21(), constant_efficiency)
    table = by_table(compared)["sc21"]
    assert table["fitted_on"] == 1
    assert (table["all"]["rows"], table["not_fitted"]["rows"]) == (10, 9)
    others = [abs(one.error) for one in compared[1:]]
    assert table["not_fitted"]["mean"] == pytest.approx(sum(others) / 9)


def test_a_group_is_a_gpu_a_precision_a_software_and_a_kind_of_model():
    compared = compare([*sc21(), *vtrain()[:3]], constant_efficiency)
    assert list(by_kind(compared)) == [
        "a100_80gb fp16 megatron dense",
        "a100_80gb fp16 megatron-deepspeed dense",
    ]


def test_a_set_of_constants_is_judged_on_all_rows_that_it_is_used_for():
    row = sc21()[0]
    two = [Compared(row, row.seconds * 1.1, True, "one"), Compared(row, row.seconds * 0.7, False, "one")]
    found = by_constants([*two, Compared(row, row.seconds, False, "other")])
    assert {name: group["all"]["rows"] for name, group in found.items()} == {"one": 2, "other": 1}
    assert found["one"]["not_fitted"]["mean"] == pytest.approx(0.3)


def test_only_jobs_that_could_replace_each_other_are_ranked():
    """Of vTrain's rows each group has one model, one number of GPUs and one batch."""
    compared = compare(vtrain(), constant_efficiency)
    found = ranking(compared)["vtrain"]
    assert sum(group["candidates"] for group in found["groups"].values()) == found["candidates"] <= 1440
    largest = max(found["groups"].values(), key=lambda group: group["candidates"])
    assert largest["candidates"] == 26
    assert ranking(compared[:2]) == {}


def test_a_perfect_model_has_no_error_tau_one_and_no_regret():
    rows = vtrain()
    found = report([Compared(row, row.seconds, False, "itself") for row in rows])
    assert found["tables"]["vtrain"]["all"]["max"] == 0
    assert (found["ranking"]["vtrain"]["mean_tau"], found["ranking"]["vtrain"]["max_regret"]) == (1, 0)


def test_a_model_that_ranks_backwards_has_tau_minus_one_and_regret():
    found = ranking([Compared(row, 1 / row.seconds, False, "backwards") for row in vtrain()])["vtrain"]
    assert found["mean_tau"] == pytest.approx(-1)
    assert found["mean_regret"] > 1


def test_the_report_is_written_and_says_what_was_fitted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planner_errors, "step_time_model", lambda: constant_efficiency)
    monkeypatch.setattr("sys.argv", ["planner_errors.py", "--tables", "sc21", "--out", str(tmp_path)])
    planner_errors.main()
    found = json.loads((tmp_path / "planner_errors.json").read_text())
    assert (tmp_path / "predicted_against_measured.png").stat().st_size > 10_000
    points = json.loads((tmp_path / "predicted_against_measured.json").read_text())["points"]
    assert [point["label"] for point in points if point["fitted"]] == ["line 2: 1.7B, DP32, naive"]
    assert len(found["left_out"]) == 16
    shown = capsys.readouterr().out
    assert "a100_80gb fp16 megatron dense" in shown
    assert f"{found['tables']['sc21']['not_fitted']['mean']:.1%}" in shown


def test_assumptions_stand_beside_the_figures():
    rows = [dataclasses.replace(row, assumed=("a guess", row.model)) for row in sc21()[:2]]
    found = report(compare(rows, constant_efficiency))
    assert found["assumed"] == {"sc21": ["GPT 1.7B", "GPT 3.6B", "a guess"]}
