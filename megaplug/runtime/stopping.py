"""How a rank stops at SIGTERM, SIGINT or SIGUSR2: at once before its first step, then saved with the others.

Before a first step is done there is nothing to save, and a signal ends the process as it ends any other,
wherever it is: in C code, in a compiler, waiting for another rank. From then on Megatron's own handler takes
note, all ranks agree after each step, and the run is saved. What Megatron lacks is added here: it only looks
after a step, so that it would finish a validation of hours, and take one more step after a save.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from itertools import count
from types import FrameType
from typing import Any

from megaplug.runs.events import EventWriter

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def begin() -> None:
    """The first thing that a rank does.

    The launcher passes every signal on as SIGTERM; the others come from elsewhere, such as SLURM, which sends
    its signals to all processes of a step: what a rank forks leaves them to the rank.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    os.register_at_fork(after_in_child=_leave_to_parent)


def _leave_to_parent() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Cut(Exception):  # noqa: N818  no error
    """A validation that ends before it is whole."""


class Stopping:
    """Stands between Megatron and its signal handler.

    Args:
        events: Where the supervisor listens.
        is_validated: Whether a validation after some step is recorded, as the last rank knows it.

    Attributes:
        was_cut: A validation was not finished for a signal.
    """

    def __init__(self, events: EventWriter, is_validated: Callable[[int], bool]) -> None:
        self.was_cut = False
        self._events = events
        self._is_validated = is_validated
        self._is_due: bool | None = None
        self._is_validating = False
        self._began_to_save: int | None = None
        self._training: Any = None

    def watch(self, training: Any) -> None:
        """Begin, before anybody else stands before ``train`` or ``evaluate``.

        Args:
            training: ``megatron.training.training``, whose arguments are parsed.
        """
        self._training = training
        handler = training.get_signal_handler()
        handler.release()
        if handler._signal_received:
            os.kill(os.getpid(), signal.SIGTERM)
        self._watch_steps(training, handler)
        self._watch_saving(training)
        self._watch_validation(training)
        self._watch_loaders(training)

    def _watch_steps(self, training: Any, handler: Any) -> None:
        real_train, real_step = training.train, training.train_step
        is_armed = False

        @functools.wraps(real_step)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_armed
            answer = real_step(*args, **kwargs)
            if not is_armed:
                is_armed = True
                self._arm(handler)
            return answer

        @functools.wraps(real_train)
        def train(
            forward_step: Any, model: Any, optimizer: Any, scheduler: Any, train_data: Any, valid_data: Any,
            process: Any, config: Any, context: Any, other_data: Any, *rest: Any, **groups: Any,
        ) -> Any:  # fmt: skip
            args = training.get_args()
            if self._validation_is_due() and args.do_valid:
                held = training.should_disable_forward_pre_hook(args)
                if held:
                    training.disable_forward_pre_hook(model, param_sync=False)
                training.evaluate_and_print_results(
                    f"iteration {args.iteration}", forward_step, valid_data, model, args.iteration, process,
                    config, verbose=False, write_to_tensorboard=True, non_loss_data_func=other_data,
                    pg_collection=groups.get("pg_collection"),
                    p2p_communicator=groups.get("p2p_communicator"),
                )  # fmt: skip
                if held:
                    training.enable_forward_pre_hook(model)
            return real_train(
                forward_step, model, optimizer, scheduler, train_data, valid_data, process, config, context,
                other_data, *rest, **groups,
            )  # fmt: skip

        training.train, training.train_step = train, train_step

    def _arm(self, handler: Any) -> None:
        """From now on there is something to save."""
        handler.__enter__()
        take_note = signal.getsignal(signal.SIGTERM)
        assert callable(take_note)

        def told(number: int, frame: FrameType | None) -> None:
            self._events.write("told", signal=number)
            take_note(number, frame)

        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, told)
        self._events.write("can save")

    def _asked(self) -> bool:
        """Whether any rank was told to stop; all ranks ask together."""
        return any(self._training.get_signal_handler().signals_received())

    def _watch_saving(self, training: Any) -> None:
        real_save, real_decide = training.save_checkpoint_and_time, training.checkpoint_and_decide_exit

        @functools.wraps(real_save)
        def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> Any:
            self._began_to_save = iteration
            return real_save(iteration, *args, **kwargs)

        @functools.wraps(real_decide)
        def checkpoint_and_decide_exit(
            model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any, **kwargs: Any
        ) -> bool:
            leaves = real_decide(model, optimizer, scheduler, iteration, *args, **kwargs)
            # A signal while this step was saved: there is nothing more to be done.
            return bool(leaves) or (self._began_to_save == iteration and self._asked())

        training.save_checkpoint_and_time = save_checkpoint_and_time
        training.checkpoint_and_decide_exit = checkpoint_and_decide_exit

    def _watch_validation(self, training: Any) -> None:
        real_evaluate, real_print = training.evaluate, training.evaluate_and_print_results
        real_end = training.ft_integration.on_eval_step_end

        @functools.wraps(real_end)
        def on_eval_step_end() -> None:
            real_end()
            if self._is_validating and self._asked():
                raise _Cut

        @functools.wraps(real_evaluate)
        def evaluate(
            forward_step: Any, data: Any, model: Any, process: Any, config: Any, *args: Any, **kwargs: Any
        ) -> Any:
            machine = training.get_rerun_state_machine()
            mode = machine.get_mode()
            self._is_validating = True
            try:
                if not self._asked():
                    return real_evaluate(forward_step, data, model, process, config, *args, **kwargs)
            except _Cut:
                machine.set_mode(mode)
                config.timers = training.get_timers()
                config.timers("evaluate").stop()
                for chunk in model:
                    chunk.train()
            finally:
                self._is_validating = False
            self.was_cut = True
            # As Megatron does where its time is up.
            return None, None, True

        @functools.wraps(real_print)
        def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
            megatron_args = training.get_args()
            before = megatron_args.consumed_valid_samples
            answer = real_print(*args, **kwargs)
            if self.was_cut:
                # What is saved now begins this validation again.
                megatron_args.consumed_valid_samples = before
            return answer

        training.ft_integration.on_eval_step_end = on_eval_step_end
        training.evaluate, training.evaluate_and_print_results = evaluate, evaluate_and_print_results

    def _watch_loaders(self, training: Any) -> None:
        real_build = training.build_train_valid_test_data_loaders
        real_loader = training.build_pretraining_data_loader

        @functools.wraps(real_build)
        def build_train_valid_test_data_loaders(provider: Any) -> Any:
            args = training.get_args()
            if not self._validation_is_due() or args.consumed_valid_samples:
                return real_build(provider)
            # The first of all validations was cut. Megatron takes the 0 for that of an old checkpoint, and
            # would pass over its samples.
            number = count()

            def loader(dataset: Any, consumed_samples: int) -> Any:
                is_validation = next(number) == 1  # of training, validation and test
                return real_loader(dataset, 0 if is_validation else consumed_samples)

            training.build_pretraining_data_loader = loader
            try:
                return real_build(provider)
            finally:
                training.build_pretraining_data_loader = real_loader
                args.consumed_valid_samples = 0

        training.build_train_valid_test_data_loaders = build_train_valid_test_data_loaders

    def _validation_is_due(self) -> bool:
        """Whether the run has stopped before it had validated its last step; all ranks ask together."""
        import torch

        if self._is_due is None:
            args = self._training.get_args()
            first = args.start_eval_at_iter or 1
            continues = args.iteration >= first and args.load == args.save
            self._is_due = False
            if (
                continues
                and args.eval_interval
                and args.eval_iters
                and args.iteration % args.eval_interval == 0
            ):
                is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
                due = is_last and not self._is_validated(args.iteration)
                flag = torch.tensor([due], dtype=torch.int32, device=torch.cuda.current_device())
                torch.distributed.all_reduce(flag)
                self._is_due = bool(flag.item())
        return self._is_due
