"""What a run measures, taken where Megatron computes it and before it is rounded for a log.

Megatron's text log rounds the gradient norm to three digits and its TensorBoard writer does not know which
iteration a validation belongs to; so the functions of ``megatron.training.training`` that hold the values
are watched instead. Nothing here changes what they do.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from megaplug.runs.events import EventWriter
from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import append_metrics, read_metrics

_LOSS_KEY = "lm loss"


class MetricsRecorder:
    """Writes one line a step and one a validation to ``metrics.jsonl``, and tells the supervisor.

    Only the last rank writes: there the loss of the last pipeline stage is.

    Args:
        folder: The run's folder.
        events: Where the supervisor listens.
        iters: The iteration at which the run is finished.
        on_saved: Called on every rank after a checkpoint is complete, with its iteration.
    """

    def __init__(
        self, folder: RunFolder, events: EventWriter, iters: int, on_saved: Callable[[int], None]
    ) -> None:
        self.iteration = 0
        self._folder = folder
        self._events = events
        self._iters = iters
        self._on_saved = on_saved
        self._since = time.perf_counter()
        self._valid_loss: float | None = None
        # What an earlier start of this run has recorded is not recorded again.
        lines = read_metrics(folder.metrics_file)
        self._recorded = {(line["iteration"], line["split"]) for line in lines if "valid_loss" in line}
        self._loaded_iteration: int | None = None

    def watch(self, training: Any) -> None:
        """Stand between ``megatron.training.training`` and its own helpers.

        Args:
            training: The module, whose functions are replaced by ones that report and then return the same.
        """
        self._watch_steps(training)
        self._watch_validation(training)
        self._watch_saving(training)

    def _watch_steps(self, training: Any) -> None:
        real_train, real_log = training.train, training.training_log

        @functools.wraps(real_train)
        def train(*args: Any, **kwargs: Any) -> Any:
            self.iteration = self._loaded_iteration = training.get_args().iteration
            self._events.write("phase", name="training")
            self._since = time.perf_counter()
            return real_train(*args, **kwargs)

        @functools.wraps(real_log)
        def training_log(
            loss_dict: dict[str, torch.Tensor],
            total_loss_dict: Any,
            learning_rate: float | None,
            iteration: int,
            loss_scale: Any,
            report_memory_flag: Any,
            skipped_iter: int,
            grad_norm: float | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            self.iteration = iteration
            answer = real_log(
                loss_dict,
                total_loss_dict,
                learning_rate,
                iteration,
                loss_scale,
                report_memory_flag,
                skipped_iter,
                grad_norm,
                *args,
                **kwargs,
            )
            if _is_last_rank():
                self._step(loss_dict, learning_rate, grad_norm, training.get_args())
            self._since = time.perf_counter()
            return answer

        training.train, training.training_log = train, training_log

    def _step(
        self,
        loss_dict: dict[str, torch.Tensor],
        learning_rate: float | None,
        grad_norm: float | None,
        args: Any,
    ) -> None:
        seconds = time.perf_counter() - self._since
        tokens = args.global_batch_size * args.seq_length
        line = {
            "iteration": self.iteration,
            "loss": _number(loss_dict.get(_LOSS_KEY)),
            "grad_norm": _number(grad_norm),
            "lr": _number(learning_rate),
            "tokens": args.consumed_train_samples * args.seq_length,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        append_metrics(self._folder.metrics_file, line)
        self._events.write("step", iters=self._iters, **line)

    def _watch_validation(self, training: Any) -> None:
        real_evaluate, real_print = training.evaluate, training.evaluate_and_print_results

        @functools.wraps(real_evaluate)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            answer = real_evaluate(*args, **kwargs)
            totals = answer[0] or {}
            self._valid_loss = _number(totals.get(_LOSS_KEY))
            return answer

        @functools.wraps(real_print)
        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._events.write("phase", name="validating")
            self._valid_loss = None
            answer = real_print(prefix, *args, **kwargs)
            split = "test" if "test set" in prefix else "valid"
            if _is_last_rank() and self._valid_loss is not None:
                self._validation(
                    {"iteration": self.iteration, "valid_loss": self._valid_loss, "split": split}
                )
            self._since = time.perf_counter()
            return answer

        training.evaluate, training.evaluate_and_print_results = evaluate, evaluate_and_print_results

    def _validation(self, line: dict[str, Any]) -> None:
        # Megatron validates after the last step also where the interval has just made it do so.
        if (line["iteration"], line["split"]) not in self._recorded:
            self._recorded.add((line["iteration"], line["split"]))
            append_metrics(self._folder.metrics_file, line)
        self._events.write("valid", **line)

    def _watch_saving(self, training: Any) -> None:
        real_save = training.save_checkpoint_and_time

        @functools.wraps(real_save)
        def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> Any:
            if iteration == self._loaded_iteration:
                return None  # a run that was killed after its last save: the checkpoint is there, and whole
            started = time.perf_counter()
            answer = real_save(iteration, *args, **kwargs)
            self._on_saved(iteration)
            if torch.distributed.get_rank() == 0:
                seconds = time.perf_counter() - started
                self._events.write("saved", iteration=iteration, seconds=seconds)
            self._since = time.perf_counter()
            return answer

        training.save_checkpoint_and_time = save_checkpoint_and_time


def _is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _number(value: Any) -> float | None:
    """A finite float, or None where there is none: JSON knows neither NaN nor infinity."""
    if value is None:
        return None
    number = float(value.float().mean() if isinstance(value, torch.Tensor) else value)
    return number if math.isfinite(number) else None
