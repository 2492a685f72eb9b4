"""TensorBoard, Weights & Biases and MLflow receive a run's figures, all under the names of metrics.jsonl."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from small_jobs import SmallJobs, steps

from megaplug.errors import UserError
from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import read_metrics
from megaplug.runtime import sinks

pytestmark = pytest.mark.slow

WORDS = ["lr=constant", "train.iters=4", "train.eval_iters=1", "train.eval_interval=2"]
NAMES = {"loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "tflops", "data_seconds"}


def stay_offline() -> None:
    import os

    os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="module")
def run(small_jobs: SmallJobs, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """A run of four steps, stopped and continued after two, that tells all three."""
    store = tmp_path_factory.mktemp("mlflow")
    asked = [f"logging.mlflow_tracking_uri={store}", "logging.wandb_project=tests", "name=told"]
    small_jobs.run([*WORDS, *asked, "train.stop_at=2"], plant=stay_offline)
    return small_jobs.run([*WORDS, *asked], plant=stay_offline), store


def recorded(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl holds, by name, with the step."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(folder.metrics_file):
        for name, value in line.items():
            if name not in ("iteration", "split") and value is not None:
                found.setdefault(name, []).append((line["iteration"], value))
    assert NAMES | {"valid_loss"} <= set(found)
    assert [line["iteration"] for line in steps(folder)] == [1, 2, 3, 4]
    return found


def test_tensorboard(run: tuple[RunFolder, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run
    told: dict[str, list[Any]] = {}
    for file in sorted(folder.tensorboard.iterdir()):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            told.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    for name, values in recorded(folder).items():
        assert told[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name


def test_mlflow_keeps_one_run_that_is_continued(
    run: tuple[RunFolder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    folder, store = run
    client = MlflowClient(str(store))
    experiment = client.get_experiment_by_name("megaplug")
    (told,) = client.search_runs([experiment.experiment_id])
    assert (told.info.run_name, told.info.status) == (folder.name, "FINISHED")
    for name, values in recorded(folder).items():
        history = client.get_metric_history(told.info.run_id, name)
        assert sorted((metric.step, metric.value) for metric in history) == values, name


def test_weights_and_biases_offline(run: tuple[RunFolder, Path]) -> None:
    folder, _ = run
    files = sorted((folder.path / "wandb").rglob("*.wandb"))
    told = b"".join(file.read_bytes() for file in files)
    assert files
    for name in recorded(folder):
        assert name.encode() in told, name


def test_an_mlflow_server_that_is_not_there_is_told_within_a_few_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in sinks.PATIENCE:
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UserError, match=r"logging\.mlflow_tracking_uri"):
            sinks.MLflow(uri, "megaplug", RunFolder(tmp_path / "tiny-00000000"))
    assert time.monotonic() - began < 60
