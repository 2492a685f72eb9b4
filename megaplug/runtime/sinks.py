"""Where figures go beside ``metrics.jsonl``: TensorBoard, W&B, MLflow, all under the same names."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from megaplug.errors import UserError
from megaplug.job.schema import LoggingConfig
from megaplug.runs.folder import RunFolder

Figures = Mapping[str, float]
# Steps that MLflow's thread may lie behind before the run waits for it.
_PENDING = 1000
# MLflow's own are 7 tries of 120 s each, in which a run stands still and hears no signal.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class Sink(Protocol):
    """Something that takes figures of a step."""

    def write(self, figures: Figures, iteration: int) -> None:
        """Take the figures of one step; does not wait for a network."""

    def write_counts(self, name: str, counts: Sequence[int], iteration: int) -> None:
        """Take how often each of several things came in one step, such as tokens to each expert."""

    def close(self, good: bool) -> None:
        """Send what is still kept, and whether the run has ended in good order."""


def open_sinks(job: LoggingConfig, folder: RunFolder) -> list[Sink]:
    """The sinks of a run, on the one rank that writes; Megatron must have set up its own writers.

    Args:
        job: Says which there are.
        folder: The run; its name is the run's name everywhere.
    """
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    sinks: list[Sink] = []
    if (tensorboard := get_tensorboard_writer()) is not None:
        sinks.append(TensorBoard(tensorboard))
    if (wandb := get_wandb_writer()) is not None:
        sinks.append(WeightsAndBiases(wandb))
    if job.mlflow_tracking_uri is not None:
        sinks.append(MLflow(job.mlflow_tracking_uri, job.mlflow_experiment, folder))
    return sinks


class TensorBoard:
    """Into the event file that Megatron writes: one event a step, which costs a tenth of a scalar each."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, figures: Figures, iteration: int) -> None:
        """As `Sink.write`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.file_writer.add_summary(Summary(value=values), iteration)

    def write_counts(self, name: str, counts: Sequence[int], iteration: int) -> None:
        """As `Sink.write_counts`: a histogram with a bucket for each thing, from its number to the next."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        numbers = [(number + 0.5, count) for number, count in enumerate(counts)]
        histogram = HistogramProto(
            min=0,
            max=len(counts),
            num=sum(counts),
            sum=sum(number * count for number, count in numbers),
            sum_squares=sum(number**2 * count for number, count in numbers),
            bucket_limit=[number + 1 for number in range(len(counts))],
            bucket=counts,
        )
        value = Summary.Value(tag=name, histo=histogram)
        self._writer.file_writer.add_summary(Summary(value=[value]), iteration)

    def close(self, good: bool) -> None:
        """Megatron closes its writer."""
        self._writer.flush()


class WeightsAndBiases:
    """Into the run that Megatron has begun."""

    def __init__(self, wandb: Any) -> None:
        self._wandb = wandb

    def write(self, figures: Figures, iteration: int) -> None:
        """As `Sink.write`."""
        self._wandb.log(dict(figures), iteration)

    def write_counts(self, name: str, counts: Sequence[int], iteration: int) -> None:
        """As `Sink.write_counts`: a histogram with a bucket for each thing."""
        edges = list(range(len(counts) + 1))
        self._wandb.log({name: self._wandb.Histogram(np_histogram=(list(counts), edges))}, iteration)

    def close(self, good: bool) -> None:
        """Megatron ends its run where it leaves in good order, and wandb itself at exit."""


class MLflow:
    """Into the one run of this folder, which is continued where there is one.

    Args:
        uri: A server, or a folder.
        experiment: Made where it is missing.
        folder: Names the run.

    Raises:
        UserError: The server cannot be reached or refuses.
    """

    def __init__(self, uri: str, experiment: str, folder: RunFolder) -> None:
        # A rank talks to the address that it was given and to no other.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if urlparse(uri).scheme in ("", "file"):
            # MLflow asks for it before it writes into a folder, which is what the user has named.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(uri if urlparse(uri).scheme else str(Path(uri).resolve()))
        self._pending: deque[Any] = deque()
        try:
            self._run = self._begin(experiment, folder)
        except MlflowException as error:
            raise UserError(
                f"logging.mlflow_tracking_uri: {uri} cannot be used: {error.message}",
                hint="start the server, correct the address, or leave the key out",
                exit_code=1,
            ) from error

    def _begin(self, experiment: str, folder: RunFolder) -> str:
        """The identifier of the run, which is made where there is none."""
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known is not None else self._client.create_experiment(experiment)
        tags = {"megaplug.folder": str(folder.path.resolve())}
        wanted = f"tags.`megaplug.folder` = '{tags['megaplug.folder']}'"
        before = self._client.search_runs([number], wanted, max_results=1)
        if not before:
            return str(self._client.create_run(number, tags=tags, run_name=folder.name).info.run_id)
        run = str(before[0].info.run_id)
        self._client.update_run(run, status="RUNNING")
        return run

    def write(self, figures: Figures, iteration: int) -> None:
        """As `Sink.write`: a thread of MLflow's sends them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, iteration) for name, value in figures.items()]
        self._pending.append(self._client.log_batch(self._run, metrics, synchronous=False))
        if len(self._pending) > _PENDING:
            self._await(self._pending.popleft())

    def write_counts(self, name: str, counts: Sequence[int], iteration: int) -> None:
        """Nothing: MLflow has numbers only, and ``metrics.jsonl`` has the counts."""

    def close(self, good: bool) -> None:
        """As `Sink.close`."""
        while self._pending:
            self._await(self._pending.popleft())
        self._client.set_terminated(self._run, status="FINISHED" if good else "FAILED")

    def _await(self, operation: Any) -> None:
        from mlflow.exceptions import MlflowException

        try:
            operation.wait()
        except MlflowException as error:  # a run does not end because a server of figures does
            print(f"megaplug: MLflow has not taken all figures: {error}", flush=True)
