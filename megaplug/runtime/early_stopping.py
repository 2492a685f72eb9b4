"""A run ends, with a checkpoint, once its validations get no better; all ranks agree on it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from megaplug.job.freeze import FrozenJob
from megaplug.runs.early_stop import Plateau, has_stopped
from megaplug.runs.metrics import read_metrics
from megaplug.runtime.metrics import MetricsRecorder
from megaplug.runtime.source_losses import evaluated_split


class EarlyStopping:
    """Stands around Megatron's validation, and where it decides whether to go on.

    Args:
        frozen: The job.

    Attributes:
        reason: Why the run ends early; empty while it goes on.
    """

    def __init__(self, frozen: FrozenJob) -> None:
        self.reason = ""
        self._patience = frozen.job.train.early_stop_patience
        self._min_delta = frozen.job.train.early_stop_min_delta
        self._metrics_file = frozen.folder.metrics_file

    def watch(self, training: Any, recorder: MetricsRecorder) -> None:
        """Put it in place.

        Args:
            training: ``megatron.training.training``.
            recorder: Stands there already: it writes the validations down.
        """
        if self._patience is None:
            return
        real_print, real_decide = training.evaluate_and_print_results, training.checkpoint_and_decide_exit

        @functools.wraps(real_print)
        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            answer = real_print(prefix, *args, **kwargs)
            if evaluated_split(prefix) == "valid":
                self._judge(recorder.iteration)
            return answer

        @functools.wraps(real_decide)
        def checkpoint_and_decide_exit(
            model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any, **kwargs: Any
        ) -> bool:
            megatron_args = training.get_args()
            before = megatron_args.exit_interval
            if self.reason:
                # It saves and leaves where the step is a multiple of it.
                megatron_args.exit_interval = iteration
            try:
                return bool(real_decide(model, optimizer, scheduler, iteration, *args, **kwargs))
            finally:
                megatron_args.exit_interval = before

        training.evaluate_and_print_results = evaluate_and_print_results
        training.checkpoint_and_decide_exit = checkpoint_and_decide_exit

    def _judge(self, iteration: int) -> None:
        """On all ranks: the last one, which has written the losses down, decides."""
        last = torch.distributed.get_world_size() - 1
        found: Plateau | None = None
        if torch.distributed.get_rank() == last:
            lines = read_metrics(self._metrics_file)
            found = has_stopped(lines, iteration, self._patience, self._min_delta)
        told = dataclasses.astuple(found) if found is not None else (math.nan,) * 4
        figures = torch.tensor(told, dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.broadcast(figures, src=last)
        best, best_iteration, waited, iteration = figures.tolist()
        if not math.isnan(best):
            plateau = Plateau(best, int(best_iteration), int(waited), int(iteration))
            self.reason = plateau.reason(self._min_delta)
