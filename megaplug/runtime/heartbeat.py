"""Where this rank stands: told to the supervisor once a second, and by its stack when it is asked.

The main thread counts what it gets done; a thread of its own tells the count. So a rank that hangs is known
by a count that stands still, whether the thread can still tell it (an endless loop, a collective that nobody
joins) or not (a stopped process, C code that keeps the interpreter to itself).
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megaplug.runs.events import STACK_FD, STACK_SIGNAL, EventWriter

BEAT_S = 1.0


class Whereabouts:
    """What this process is doing, and how much of it is done.

    Attributes:
        phase: ``starting``, ``building the model``, ``loading the checkpoint``, ``loading data``,
            ``first step``, ``training``, ``validating``, ``saving`` or ``ending``.
        iteration: The last training step that was completed.
        progress: Counts whatever gets done: phases, steps, micro-batches.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self.iteration = 0
        self.progress = 0
        self.events = EventWriter(None)

    def at(self, phase: str) -> None:
        """A phase begins, which is told at once: it has a limit of its own."""
        self.phase = phase
        self.progress += 1
        self.beat()

    def beat(self) -> None:
        """Tell the supervisor, from either thread."""
        progress = self.progress  # first: whoever counts has named the phase before
        self.events.write("beat", progress=progress, iteration=self.iteration, phase=self.phase)

    def did(self, iteration: int | None = None) -> None:
        """Something is done: a micro-batch, or the training step of that number."""
        if iteration is not None:
            self.iteration = iteration
        self.progress += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase that leads back to the one before."""
        before = self.phase
        self.at(phase)
        try:
            yield
        finally:
            self.at(before)


here = Whereabouts()
"""Of this process."""


def start_from_environment() -> threading.Thread | None:
    """Begin to beat where a supervisor listens, and give the stack of every thread on `STACK_SIGNAL`.

    The stack is written by a C signal handler, so that also a thread that never comes back to the interpreter
    is seen.
    """
    stack_fd = os.environ.get(STACK_FD)
    if stack_fd:
        faulthandler.register(STACK_SIGNAL, file=int(stack_fd), all_threads=True, chain=False)
    here.events = EventWriter.from_environment()
    if here.events.fd is None:
        return None
    thread = threading.Thread(target=_beat, args=(threading.Event(),), name="heartbeat", daemon=True)
    thread.start()
    return thread


def _beat(never: threading.Event) -> None:
    while True:
        here.beat()
        never.wait(BEAT_S)


def watch(training: Any, warmup_steps: int) -> None:
    """Follow Megatron's way through ``megatron.training.training``.

    Args:
        training: The module, whose functions are replaced by ones that say where they are.
        warmup_steps: So many steps pay for what is made once: kernels compiled, CUDA graphs captured.
    """
    _phase(training, "setup_model_and_optimizer", "building the model")
    _phase(training, "load_checkpoint", "loading the checkpoint")
    _phase(training, "build_train_valid_test_data_iterators", "loading data")
    _phase(training, "evaluate_and_print_results", "validating")
    _phase(training, "save_checkpoint_and_time", "saving")
    real_train, real_step, steps = training.train, training.train_step, 0

    def train(*args: Any, **kwargs: Any) -> Any:
        here.iteration = training.get_args().iteration
        here.at("first step")
        answer = real_train(*args, **kwargs)
        here.at("ending")
        return answer

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        answer = real_step(*args, **kwargs)
        steps += 1
        here.did(here.iteration + 1)
        if steps == warmup_steps:
            here.at("training")
        return answer

    training.train, training.train_step = train, train_step


def counting(step: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward step, each micro-batch of which counts as progress."""

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        answer = step(*args, **kwargs)
        here.did()
        return answer

    return forward_step


def _phase(training: Any, name: str, phase: str) -> None:
    real = getattr(training, name)

    def followed(*args: Any, **kwargs: Any) -> Any:
        with here.during(phase):
            return real(*args, **kwargs)

    setattr(training, name, followed)
