"""How a rank saves: Megatron writes beside, every rank hashes what it writes, rank 0 gives it its name.

Megatron reads ``args.save`` when it begins to save and puts everything below it, its own tracker included. So
that is another folder for as long as it does (`megaplug.runs.saving`), and ``--save`` keeps its meaning for
all else that Megatron writes there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megaplug.runs import checkpoints, saving
from megaplug.runs.events import EventWriter
from megaplug.runs.folder import RunFolder
from megaplug.runs.hashed import hashing_open
from megaplug.runs.retention import Retention, prune, validation_losses


class Saver:
    """Stands around ``megatron.training.training.save_checkpoint``.

    Args:
        folder: The run's.
        extra: For every manifest, beside the iteration.
        retention: Which checkpoints are kept.
        events: Where the supervisor listens.
        on_saved: Called on every rank when a checkpoint has its name, with its iteration.
    """

    def __init__(
        self,
        folder: RunFolder,
        extra: Mapping[str, Any],
        retention: Retention,
        events: EventWriter,
        on_saved: Callable[[int], None],
    ) -> None:
        self._directory = folder.checkpoints.resolve()
        self._metrics_file = folder.metrics_file
        self._extra = dict(extra)
        self._retention = retention
        self._events = events
        self._on_saved = on_saved
        self._last: int | None = None
        self._began = 0.0
        self._cleaner = ThreadPoolExecutor(1, thread_name_prefix="old checkpoints")
        self._cleaning: Future[Any] | None = None

    def watch(self, training: Any) -> None:
        """Stand between Megatron and its own way of saving.

        Args:
            training: ``megatron.training.training``.
        """
        from megatron.training import wandb_utils

        real_save, real_artifact = training.save_checkpoint, wandb_utils.on_save_checkpoint_success
        hash_what_is_written(saving.beside(self._directory))

        @functools.wraps(real_save)
        def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
            if iteration == self._last and not holds_a_step():
                return
            self._last, self._began = iteration, time.perf_counter()
            if self._cleaning is not None:
                # The disk has room for one checkpoint more than are kept.
                self._cleaning.result()
            megatron_args = training.get_args()
            place = megatron_args.save
            megatron_args.save = str(saving.beside(self._directory))
            # It names the folder, which has not its name yet.
            wandb_utils.on_save_checkpoint_success = _later
            try:
                real_save(iteration, *args, **kwargs)
            finally:
                megatron_args.save = place
                wandb_utils.on_save_checkpoint_success = real_artifact
            self._complete(iteration)

        training.save_checkpoint = save_checkpoint

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

    def _complete(self, iteration: int) -> None:
        """On all ranks, when all have written."""
        from megatron.training import checkpointing, wandb_utils

        rank, directory = torch.distributed.get_rank(), self._directory
        if rank == 0:
            saving.complete(directory, iteration, {"iteration": iteration, **self._extra})
        torch.distributed.barrier()
        if rank == torch.distributed.get_world_size() - 1:
            name = checkpointing.get_checkpoint_name(str(directory), iteration, return_base_dir=True)
            tracker = checkpointing.get_checkpoint_tracker_filename(str(directory))
            wandb_utils.on_save_checkpoint_success(name, tracker, str(directory), iteration)
        self._on_saved(iteration)
        if rank == 0:
            self._events.write("saved", iteration=iteration, seconds=time.perf_counter() - self._began)
            self._cleaning = self._cleaner.submit(self._prune)

    def _prune(self) -> None:
        losses = validation_losses(self._metrics_file) if self._retention.keep_best else {}
        prune(self._directory, self._retention, losses)


def hash_what_is_written(place: Path) -> None:
    """Let Megatron's writers, and torch's own, hash the files that they write below a folder."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    filesystem_async.open = opened = hashing_open(place)
    real_create = filesystem.FileSystem.create_stream

    @functools.wraps(real_create)
    def create_stream(self: Any, path: Any, mode: str) -> Any:
        # ``.metadata`` is renamed when it is written: it is read once more, being small.
        if mode == "wb" and str(path).endswith(filesystem.DEFAULT_SUFFIX):
            return opened(path, mode)
        return real_create(self, path, mode)

    filesystem.FileSystem.create_stream = create_stream


def holds_a_step() -> bool:
    """Whether Megatron saves the step before one that is to be computed again, with that one's batch."""
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    return get_rerun_state_machine().state == RerunState.WILL_RERUN_FROM_CHECKPOINT


def _later(*_: Any) -> None:
    """In the place of what needs the checkpoint's own name."""
