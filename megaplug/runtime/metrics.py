"""What a run measures, taken where Megatron computes it and before it is rounded for a log.

Megatron's text log rounds the gradient norm to three digits and its TensorBoard writer does not know which
iteration a validation belongs to; so the functions of ``megatron.training.training`` that hold the values
are watched instead. Nothing here changes what they do.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import torch

from megaplug.job.freeze import FrozenJob
from megaplug.runs.events import EventWriter
from megaplug.runs.metrics import append_metrics, read_metrics
from megaplug.runtime import source_losses
from megaplug.runtime.expert_load import ExpertLoad, Starvation, load_figures
from megaplug.runtime.pace import Pace
from megaplug.runtime.rank_figures import RankFigures, merged
from megaplug.runtime.saving import holds_a_step
from megaplug.runtime.sinks import Sink, open_sinks

_LOSS_KEY = "lm loss"


class MetricsRecorder:
    """Writes one line a step and one a validation to ``metrics.jsonl``, and tells the supervisor.

    Only the last rank writes: there the loss of the last pipeline stage is.

    Args:
        frozen: The job.
        events: Where the supervisor listens.
    """

    def __init__(self, frozen: FrozenJob, events: EventWriter) -> None:
        self.iteration = 0
        self.figures: RankFigures | None = None
        self._frozen = frozen
        self._folder = frozen.folder
        self._events = events
        self._pace = Pace.of(frozen)
        self._sinks: list[Sink] = []
        self._since = time.perf_counter()
        self._valid_loss: float | None = None
        # What an earlier start of this run has recorded is not recorded again.
        lines = read_metrics(self._folder.metrics_file)
        self._recorded = {_evaluation(line) for line in lines if "valid_loss" in line}
        self._of_sources: dict[str, float | None] = {}
        self._loaded_iteration: int | None = None
        job = frozen.job
        experts = job.moe.num_experts
        self._load = ExpertLoad(job.model.num_layers, experts) if experts else None
        self._starvation = Starvation()

    def watch(self, training: Any) -> None:
        """Stand between ``megatron.training.training`` and its own helpers.

        Args:
            training: The module, whose functions are replaced by ones that report and then return the same.
        """
        on_cpu = self._frozen.derived.device == "cpu"
        asked = self._frozen.job.logging.communication
        self.figures = RankFigures(on_cpu=on_cpu, communication=on_cpu if asked is None else asked)
        self.figures.watch(training)
        if self._load is not None:
            self._load.watch(training)
        self._watch_steps(training)
        self._watch_validation(training)
        self._watch_saving(training)

    @property
    def step_in_progress(self) -> int | None:
        """The training step that is being computed; None before training has begun."""
        return None if self._loaded_iteration is None else self.iteration + 1

    def is_validated(self, iteration: int) -> bool:
        """Whether the validation loss after a step is recorded."""
        return (iteration, "valid", None) in self._recorded

    def close(self, good: bool) -> None:
        """Send what is still kept for TensorBoard and others."""
        for sink in self._sinks:
            sink.close(good)

    def _watch_steps(self, training: Any) -> None:
        real_train, real_log = training.train, training.training_log

        @functools.wraps(real_train)
        def train(*args: Any, **kwargs: Any) -> Any:
            self.iteration = self._loaded_iteration = training.get_args().iteration
            if _is_last_rank():
                self._sinks = open_sinks(self._frozen.job.logging, self._folder)
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
            params_norm: float | None,
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
                params_norm,
                *args,
                **kwargs,
            )
            now = time.perf_counter()
            seconds, self._since = now - self._since, now
            megatron_args = training.get_args()
            figures = self._of_ranks() if iteration % megatron_args.log_interval == 0 else {}
            if _is_last_rank():
                line = self._line(loss_dict, learning_rate, grad_norm, seconds, megatron_args)
                if params_norm is not None:
                    line["params_norm"] = _number(params_norm)
                if megatron_args.fp16:
                    line |= {"loss_scale": _number(loss_scale), "skipped": int(skipped_iter)}
                self._step(line | figures)
            return answer

        training.train, training.training_log = train, training_log

    def _of_ranks(self) -> dict[str, Any]:
        """What the ranks measure for themselves; every rank calls it, and says what memory it has used."""
        assert self.figures is not None
        rows = self.figures.gather()
        loads = self._load.gather() if self._load is not None else {}
        self._events.write("memory", iteration=self.iteration, peak=self.figures.peak)
        if not _is_last_rank():
            return {}
        for line in self._starvation.told_of(loads):
            self._events.write("note", text=f"step {self.iteration}: {line}")
        return {**merged(rows), **load_figures(loads, self._frozen.topology.ep)}

    def _line(
        self,
        loss_dict: dict[str, torch.Tensor],
        learning_rate: float | None,
        grad_norm: float | None,
        seconds: float,
        args: Any,
    ) -> dict[str, Any]:
        tokens = args.global_batch_size * args.seq_length
        return {
            "iteration": self.iteration,
            "loss": _number(loss_dict.get(_LOSS_KEY)),
            "grad_norm": _number(grad_norm),
            "lr": _number(learning_rate),
            "tokens": args.consumed_train_samples * args.seq_length,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            **self._pace.of_step(tokens, seconds),
        }

    def _step(self, line: dict[str, Any]) -> None:
        append_metrics(self._folder.metrics_file, line)
        self._to_sinks(line)
        told = {
            name: value for name, value in line.items() if name != "tokens_per_expert" and "/" not in name
        }
        self._events.write("step", iters=self._frozen.derived.iters, **told)

    def _to_sinks(self, line: dict[str, Any]) -> None:
        figures = {
            name: value
            for name, value in line.items()
            if name != "iteration" and isinstance(value, int | float)
        }
        for sink in self._sinks:
            sink.write(figures, line["iteration"])
            for layer, counts in line.get("tokens_per_expert", {}).items():
                sink.write_counts(f"tokens_per_expert/layer_{layer}", counts, line["iteration"])

    def _watch_validation(self, training: Any) -> None:
        real_evaluate, real_print = training.evaluate, training.evaluate_and_print_results

        @functools.wraps(real_evaluate)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            answer = real_evaluate(*args, **kwargs)
            totals = answer[0] or {}
            self._valid_loss = _number(totals.get(_LOSS_KEY))
            self._of_sources = {
                key.removeprefix(source_losses.KEY): _number(total)
                for key, total in totals.items()
                if key.startswith(source_losses.KEY)
            }
            return answer

        @functools.wraps(real_print)
        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._events.write("phase", name="validating")
            self._valid_loss, self._of_sources = None, {}
            answer = real_print(prefix, *args, **kwargs)
            split = source_losses.evaluated_split(prefix)
            if _is_last_rank() and self._valid_loss is not None:
                line = {"iteration": self.iteration, "valid_loss": self._valid_loss, "split": split}
                self._validation(line)
                for source, loss in self._of_sources.items():
                    # Without a sample in these batches there is no loss.
                    if loss is not None:
                        self._validation({**line, "valid_loss": loss, "source": source})
            self._since = time.perf_counter()
            return answer

        training.evaluate, training.evaluate_and_print_results = evaluate, evaluate_and_print_results

    def _validation(self, line: dict[str, Any]) -> None:
        # Megatron validates after the last step also where the interval has just made it do so.
        if _evaluation(line) not in self._recorded:
            self._recorded.add(_evaluation(line))
            append_metrics(self._folder.metrics_file, line)
            name = "valid_loss" if line["split"] == "valid" else "test_loss"
            if "source" in line:
                name = f"{name}/{line['source']}"
            self._to_sinks({"iteration": line["iteration"], name: line["valid_loss"]})
        self._events.write("valid", **line)

    def _watch_saving(self, training: Any) -> None:
        real_save = training.save_checkpoint_and_time

        @functools.wraps(real_save)
        def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> Any:
            if iteration == self._loaded_iteration and not holds_a_step():
                return None  # a run that was killed after its last save: the checkpoint is there, and whole
            answer = real_save(iteration, *args, **kwargs)
            self._since = time.perf_counter()
            return answer

        training.save_checkpoint_and_time = save_checkpoint_and_time


def _evaluation(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["iteration"], line["split"], line.get("source")


def _is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _number(value: Any) -> float | None:
    """A finite float, or None where there is none: JSON knows neither NaN nor infinity."""
    if value is None:
        return None
    number = float(value.float().mean() if isinstance(value, torch.Tensor) else value)
    return number if math.isfinite(number) else None
