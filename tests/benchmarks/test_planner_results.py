"""The stored errors are what model and constants give now; if not: python benchmarks/planner_errors.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.planner_errors import compare, report, rounded, step_time_model
from benchmarks.published.tables import all_measured
from megaplug.plan.step_time.constants import constants_names, stored_constants

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks" / "results" / "planner_errors.json"


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_stored_report_is_what_the_model_says_now(stored):
    fresh = rounded(report(compare(all_measured(), step_time_model())))
    assert list(fresh) == list(stored)
    for part in ("tables", "constants", "kinds"):
        assert fresh[part].keys() == stored[part].keys()
        for name, group in fresh[part].items():
            for rows in ("all", "not_fitted"):
                assert group[rows] == pytest.approx(stored[part][name][rows], abs=2e-3), (part, name)
    assert fresh["left_out"] == stored["left_out"]
    for table, ranks in fresh["ranking"].items():
        for key in ("mean_tau", "mean_regret", "max_regret"):
            assert ranks[key] == pytest.approx(stored["ranking"][table][key], abs=5e-3), (table, key)


def test_constants_are_fitted_on_few_rows_and_rows_remain_to_judge_them_by(stored):
    """A quarter of vTrain's rows at the most, three rows of every other set."""
    for name, group in stored["constants"].items():
        most = 360 if name == "a100_bf16" else 3
        assert 1 <= group["fitted_on"] <= most, name
        assert group["not_fitted"] is not None, name


def test_the_planners_page_shows_the_errors_of_every_table(stored):
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    for name, group in stored["tables"].items():
        judged = group["not_fitted"]
        row = (
            f" | {group['fitted_on']:,} | {judged['rows']:,} | {judged['mean']:.1%} | {judged['p90']:.1%} |"
        ).replace("%", " %")
        assert row in page, (name, row)
    above = [name for name in constants_names() if stored_constants(name)["held_out"]["mean"] > 0.10]
    assert len(above) == 6 and "of which six are above 10 %" in page
