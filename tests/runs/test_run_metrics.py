"""Metrics and events are cut back to the checkpoint, and drawn."""

from __future__ import annotations

import json
import warnings

import pytest

from megaplug.runs.curve import draw_loss_curve
from megaplug.runs.metrics import append_metrics, cut_metrics, cut_tensorboard, read_metrics


@pytest.fixture
def metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for iteration in range(1, 11):
        append_metrics(path, {"iteration": iteration, "loss": 3.0 / iteration, "grad_norm": float("nan")})
        if iteration % 5 == 0:
            append_metrics(path, {"iteration": iteration, "valid_loss": 2.0, "split": "valid"})
    return path


def test_lines_are_strict_json(metrics_file):
    lines = [json.loads(line, parse_constant=pytest.fail) for line in metrics_file.read_text().splitlines()]
    assert lines[0] == {"iteration": 1, "loss": 3.0, "grad_norm": None} and len(lines) == 12


def test_what_lies_after_the_checkpoint_is_cut(metrics_file):
    assert cut_metrics(metrics_file, 5) == 6
    lines = read_metrics(metrics_file)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 5] and "valid_loss" in lines[-1]
    assert cut_metrics(metrics_file, 5) == 0


def test_a_torn_line_is_dropped_and_the_next_is_not_glued_to_it(metrics_file):
    with metrics_file.open("a") as file:
        file.write('{"iteration": 11, "lo')
    assert len(read_metrics(metrics_file)) == 12
    assert cut_metrics(metrics_file, 100) == 1
    append_metrics(metrics_file, {"iteration": 11, "loss": 0.1})
    assert read_metrics(metrics_file)[-1] == {"iteration": 11, "loss": 0.1}


def test_nothing_to_cut_is_no_error(tmp_path):
    assert cut_metrics(tmp_path / "none", 3) == 0 and cut_tensorboard(tmp_path / "none", 3) == 0
    assert read_metrics(tmp_path / "none") == []


def _scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    loaded.Reload()
    return {
        tag: [(event.step, event.value) for event in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]
    }


@pytest.fixture
def events(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter
    folder = tmp_path / "tensorboard"
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("args", "all of them")
        for step in range(1, 11):
            writer.add_scalar("lm loss", 10.0 - step, step)
            writer.add_scalar("lm loss vs samples", 10.0 - step, step * 8)
    return folder


def test_event_files_are_cut_by_step_and_by_sample(events):
    assert cut_tensorboard(events, 4, samples=32) == 12
    assert _scalars(events) == {
        "lm loss": [(step, 10.0 - step) for step in range(1, 5)],
        "lm loss vs samples": [(step * 8, 10.0 - step) for step in range(1, 5)],
    }
    assert cut_tensorboard(events, 4, samples=32) == 0


@pytest.mark.parametrize("validations", [None, 1, 0])
def test_validations_of_the_last_step_are_kept_as_often_as_is_said(tmp_path, validations):
    """The one at a run's end comes again when the run goes on from its last step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter
    folder = tmp_path / "tensorboard"
    for _ in range(2):  # a run that was started twice has two files
        with SummaryWriter(str(folder), filename_suffix=f".{len(list(tmp_path.rglob('events*')))}") as writer:
            for step in (5, 10):
                writer.add_scalar("lm loss", 1.0, step)
                writer.add_scalar("lm loss validation", 2.0, step)
                writer.add_scalar("lm loss validation vs samples", 2.0, step * 8)
                writer.add_scalar("valid_loss", 2.0, step)
    dropped = 0 if validations is None else 2 * (2 - validations)
    assert cut_tensorboard(folder, 10, 80, validations) == dropped
    kept = 2 if validations is None else validations
    found = {tag: [step for step, _ in values] for tag, values in _all_scalars(folder).items()}
    assert found["lm loss"] == found["valid_loss"] == [5, 5, 10, 10]
    assert found["lm loss validation"] == [5, 5, *[10] * kept]
    assert found["lm loss validation vs samples"] == [40, 40, *[80] * kept]


def _all_scalars(folder):
    """Those of every file, in the order of steps."""
    found = {}
    for path in sorted(folder.iterdir()):
        for tag, values in _scalars(path).items():
            found[tag] = sorted([*found.get(tag, []), *values])
    return found


def test_a_torn_event_is_dropped(events):
    (path,) = events.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert cut_tensorboard(events, 100) == 0
    scalars = _scalars(events)
    assert len(scalars["lm loss"]) == 10 and len(scalars["lm loss vs samples"]) == 9
    size = path.stat().st_size
    cut_tensorboard(events, 100)
    assert path.stat().st_size == size


def test_the_curve_is_a_picture(metrics_file, tmp_path):
    png = tmp_path / "loss.png"
    assert draw_loss_curve(metrics_file, png, "tiny", ("unigram", 2.9))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_no_metrics_no_picture(tmp_path):
    assert not draw_loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png", "tiny")
    assert not (tmp_path / "loss.png").exists()
