"""How a rank saves: Megatron writes beside, every rank hashes what it writes, rank 0 gives it its name.

Megatron reads ``args.save`` when it begins to save and puts everything below it, its own tracker included. So
that is another folder for as long as it does (`megaplug.runs.saving`), and ``--save`` keeps its meaning for
all else that Megatron writes there.

Saved asynchronously, a checkpoint is written by a process of each rank's own while training goes on, and gets
its name in the last of the functions that Megatron calls on all ranks when all have written.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from megaplug.runs import checkpoints, saving
from megaplug.runs.events import EventWriter
from megaplug.runs.folder import RunFolder
from megaplug.runs.retention import Retention, prune, validation_losses
from megaplug.runtime import forking, writers
from megaplug.runtime.forking import Unsharing
from megaplug.runtime.heartbeat import here


class Saver:
    """Stands around ``megatron.training.training.save_checkpoint``.

    Args:
        folder: The run's.
        extra: For every manifest, beside the iteration.
        retention: Which checkpoints are kept.
        events: Where the supervisor listens.
        on_saved: Called on every rank when a checkpoint has its name, with its iteration.
        strategy: Whose processes write while training goes on, ``mcore`` or ``nvrx``; empty: none do.
    """

    def __init__(
        self,
        folder: RunFolder,
        extra: Mapping[str, Any],
        retention: Retention,
        events: EventWriter,
        on_saved: Callable[[int], None],
        strategy: str = "",
    ) -> None:
        self._directory = folder.checkpoints.resolve()
        self._metrics_file = folder.metrics_file
        self._extra = dict(extra)
        self._retention = retention
        self._events = events
        self._on_saved = on_saved
        self._strategy = strategy
        self._last: int | None = None
        self._began = 0.0
        self._stood_still = 0.0
        self._since: float | None = None
        self._artifact: Callable[..., Any] = _later
        self._cleaner = ThreadPoolExecutor(1, thread_name_prefix="old checkpoints")
        self._cleaning: Future[Any] | None = None
        self._unsharing: Unsharing | None = None
        self._prepared = False
        self._finishes_first = False

    def watch(self, training: Any) -> None:
        """Stand between Megatron and its own way of saving.

        Args:
            training: ``megatron.training.training``.
        """
        from megatron.training import checkpointing, wandb_utils

        real_save, real_schedule = training.save_checkpoint, checkpointing.schedule_async_save
        real_finalize = training.maybe_finalize_async_save
        # It names the folder, which has not its name yet.
        self._artifact, wandb_utils.on_save_checkpoint_success = (
            wandb_utils.on_save_checkpoint_success,
            _later,
        )
        writers.watch(saving.beside(self._directory))

        @functools.wraps(real_save)
        def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
            if iteration == self._last and not holds_a_step():
                return
            megatron_args = training.get_args()
            if self._strategy:
                finalize(blocking=True)
                self._prepare_to_fork(args[0])
                self._finish_first(functools.partial(finalize, blocking=True))
            if self._cleaning is not None:
                # The disk has room for one checkpoint more than are kept.
                self._cleaning.result()
            self._last, self._began, self._stood_still = iteration, time.perf_counter(), 0.0
            place = megatron_args.save
            megatron_args.save = str(saving.beside(self._directory))
            try:
                with self._standing_still():
                    real_save(iteration, *args, **kwargs)
                    if not self._strategy:
                        self._complete()
            finally:
                megatron_args.save = place

        @functools.wraps(real_schedule)
        def schedule(request: Any) -> None:
            request.add_finalize_fn(self._complete)
            if self._strategy != "mcore":
                real_schedule(request)
                return
            real_schedule(writers.apart(request))
            self._unsharing = Unsharing(writers.ranges_of(request))

        @functools.wraps(real_finalize)
        def finalize(blocking: bool = False, terminate: bool = False) -> None:
            if checkpointing.is_empty_async_queue():
                real_finalize(blocking, terminate)
                return
            with here.during("saving") if blocking else contextlib.nullcontext(), self._standing_still():
                real_finalize(blocking, terminate)

        training.save_checkpoint = save_checkpoint
        checkpointing.schedule_async_save = schedule
        training.maybe_finalize_async_save = finalize

    def close(self) -> None:
        """Wait until the last of the old checkpoints is removed.

        Raises:
            UserError: It could not be.
        """
        if self._cleaning is not None:
            self._cleaning.result()
        self._cleaner.shutdown()
        if self._retention.keep_best:
            # The last may have been validated since, which the last rank has written down.
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                self._prune()
        checkpoints.tidy(self._directory)

    def _complete(self) -> None:
        """On all ranks, when all have written."""
        if self._unsharing is not None:
            self._unsharing.end()
        from megatron.training import checkpointing

        rank, directory, iteration = torch.distributed.get_rank(), self._directory, self._last
        assert iteration is not None
        if rank == 0:
            saving.complete(directory, iteration, {"iteration": iteration, **self._extra})
        torch.distributed.barrier()
        if rank == torch.distributed.get_world_size() - 1:
            name = checkpointing.get_checkpoint_name(str(directory), iteration, return_base_dir=True)
            tracker = checkpointing.get_checkpoint_tracker_filename(str(directory))
            self._artifact(name, tracker, str(directory), iteration)
        self._on_saved(iteration)
        if rank == 0:
            now = time.perf_counter()
            still = self._stood_still + (now - self._since if self._since is not None else 0.0)
            self._events.write("saved", iteration=iteration, seconds=now - self._began, stood_still=still)
            self._cleaning = self._cleaner.submit(self._prune)

    def _prepare_to_fork(self, model: Any) -> None:
        """Once: what is not saved is not shared with writers, nor looked through for garbage again."""
        if self._prepared:
            return
        self._prepared = True
        gc.collect()
        gc.freeze()
        owners = [
            getattr(chunk, name, None) for chunk in model for name in ("buffers", "expert_parallel_buffers")
        ]
        buffers = [buffer for owner in owners if isinstance(owner, list) for buffer in owner]
        forking.keep_from_forks(buffer.grad_data for buffer in buffers)

    def _finish_first(self, finalize: Callable[[], None]) -> None:
        """Once: Weights & Biases is told of the last checkpoint; Megatron ends it before that is written.

        One rank has it, and there the same happens as on all others a moment later.
        """
        from megatron.training.global_vars import get_wandb_writer

        wandb = get_wandb_writer()
        if wandb is None or self._finishes_first:
            return
        self._finishes_first = True
        real_finish = wandb.finish

        @functools.wraps(real_finish)
        def finish(*args: Any, **kwargs: Any) -> Any:
            finalize()
            return real_finish(*args, **kwargs)

        wandb.finish = finish

    @contextlib.contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Training waits for a checkpoint: for so long, and what goes wrong is said of that checkpoint.

        Raises:
            UserError: It could not be written.
        """
        self._since = time.perf_counter()
        try:
            with writers.told_of(self._last):
                yield
        finally:
            self._stood_still += time.perf_counter() - self._since
            self._since = None

    def _prune(self) -> None:
        losses = validation_losses(self._metrics_file) if self._retention.keep_best else {}
        prune(self._directory, self._retention, losses)


def holds_a_step() -> bool:
    """Whether Megatron saves the step before one that is to be computed again, with that one's batch."""
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    return get_rerun_state_machine().state == RerunState.WILL_RERUN_FROM_CHECKPOINT


def _later(*_: Any) -> None:
    """In the place of what needs the checkpoint's own name."""
