"""Predicted against measured: errors are counted over the points that were not fitted."""

from __future__ import annotations

import json
import statistics

import pytest

from megaplug.errors import UserError
from megaplug.plan.pictures import Point, draw_predicted
from megaplug.plan.pictures.predicted import predicted_data

POINTS = [
    Point("SC21 A100", "1.7B", 10.0, 10.5),
    Point("SC21 A100", "1T", 90.0, 72.0),
    Point("SC21 A100", "175B", 20.0, 40.0, fitted=True),
    Point("NeMo H100", "70B", 3.0, 3.0, fitted=True),
]


def test_errors_of_a_table_leave_the_fitted_points_out():
    tables = predicted_data(POINTS)["tables"]
    errors = [0.05, 0.2]
    assert tables["SC21 A100"] == {
        "points": 3,
        "fitted": 1,
        "mean_error": pytest.approx(statistics.fmean(errors)),
        "median_error": pytest.approx(statistics.median(errors)),
        "max_error": pytest.approx(0.2),
        "within_band": 0.5,
    }
    assert tables["NeMo H100"]["mean_error"] is None


def test_every_point_is_in_the_file_beside_the_picture(tmp_path):
    png = draw_predicted(POINTS, tmp_path / "points.png", title="How right it is")
    written = json.loads((tmp_path / "points.json").read_text())["points"]
    assert [(row["measured"], row["predicted"], row["fitted"]) for row in written] == [
        (point.measured, point.predicted, point.fitted) for point in POINTS
    ]
    assert png.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("measured", "predicted"), [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_a_point_without_a_place_on_logarithmic_axes_is_named(tmp_path, measured, predicted):
    with pytest.raises(UserError, match=r"SC21 A100, odd row"):
        draw_predicted([Point("SC21 A100", "odd row", measured, predicted)], tmp_path / "points.png")


def test_no_points_are_no_picture(tmp_path):
    with pytest.raises(UserError, match="no measured point"):
        draw_predicted([], tmp_path / "points.png")
    assert list(tmp_path.iterdir()) == []
