"""``profile=true``: a torch profiler trace of some steps of some ranks, for Perfetto and TensorBoard.

Megatron's own profiler counts from the run's first step, writes one trace below TensorBoard's folder and
knows no memory; its ranges for nsys are used as they are. A trace does not change what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from megaplug.job.freeze import FrozenJob
from megaplug.job.schema import ProfileConfig

ForwardStep = Callable[..., Any]
# Allocations that a memory snapshot holds at most; what torch's own documentation suggests.
_MAX_ALLOCATIONS = 100_000


def watch(training: Any, forward_step: ForwardStep, frozen: FrozenJob, rank: int) -> ForwardStep:
    """Profile this rank's steps if the job asks for it; otherwise nothing is touched.

    Args:
        training: ``megatron.training.training``.
        forward_step: What ``pretrain()`` is going to be given.
        frozen: The job.
        rank: This rank.

    Returns:
        What ``pretrain()`` is to be given.
    """
    asked = frozen.job.profile
    if asked.kind == "none" or rank not in asked.ranks:
        return forward_step
    if asked.kind == "nsys":
        _count_from_here(training)
        return forward_step
    frozen.folder.profile.mkdir(parents=True, exist_ok=True)
    _Trace(asked, frozen.folder.profile, rank).watch(training)
    return _named("megaplug: forward of a micro-batch", forward_step)


def _count_from_here(training: Any) -> None:
    """Megatron's ranges begin so many steps after the step that this command continues from."""
    real_train = training.train

    @functools.wraps(real_train)
    def train(*args: Any, **kwargs: Any) -> Any:
        megatron_args = training.get_args()
        megatron_args.profile_step_start += megatron_args.iteration
        megatron_args.profile_step_end += megatron_args.iteration
        return real_train(*args, **kwargs)

    training.train = train


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, under a name in the trace."""

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return named


class _Trace:
    """The profiler around ``train_step``."""

    def __init__(self, asked: ProfileConfig, folder: Path, rank: int) -> None:
        self._asked = asked
        self._folder = folder
        self._rank = rank
        self._iteration = 0
        self._history = asked.profile_memory and torch.cuda.is_available()
        on_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *on_cuda],
            schedule=schedule(wait=asked.wait, warmup=asked.warmup, active=asked.active, repeat=asked.repeat),
            on_trace_ready=self._write,
            record_shapes=asked.record_shapes,
            with_stack=asked.with_stack,
            profile_memory=asked.profile_memory,
        )

    def watch(self, training: Any) -> None:
        """Stand around the training loop and each of its steps."""
        real_train, real_step = training.train, training.train_step

        @functools.wraps(real_train)
        def train(*args: Any, **kwargs: Any) -> Any:
            if self._history:
                torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
            with self._profiler:
                return real_train(*args, **kwargs)

        @functools.wraps(real_step)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            self._iteration = kwargs["iteration"] + 1
            with record_function(f"megaplug: step {self._iteration}"):
                answer = real_step(*args, **kwargs)
            self._profiler.step()
            return answer

        training.train, training.train_step = train, train_step

    def _write(self, profiler: Any) -> None:
        last = self._iteration
        # A run that ends in the middle of the recorded steps leaves what there is.
        name = f"rank{self._rank}_to_step{last}"
        beside = self._folder / f".{name}.json.gz"
        profiler.export_chrome_trace(str(beside))
        beside.replace(self._folder / f"{name}.pt.trace.json.gz")
        if self._history:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}_memory.pickle"))
        print(f"megaplug: profile of {self._asked.active} steps up to {last} in {self._folder}", flush=True)
