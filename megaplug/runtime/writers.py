"""Whoever writes a rank's part of a checkpoint: the rank itself, or a process that it forks for each save.

A forked process sees the memory of the moment in which it was forked, so that nothing needs to be copied on a
CPU: what training changes meanwhile, the kernel copies.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import torch

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors
from megaplug.runs.hashed import hashing_open
from megaplug.runtime import causes, forking
from megaplug.runtime.forking import Ranges

# How ranks that have written say that another has not.
OTHER_RANK = "another rank could not write its part"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def watch(place: Path) -> None:
    """Let Megatron's writers, and torch's own, hash the files that they write below a folder.

    What the disk refuses them is said with the file's name, and what lies in memory already is not copied.
    """
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
    writer = filesystem_async.FileSystemWriterAsync
    real_write, real_prepare = writer.write_preloaded_data, writer.prepare_write_data

    @functools.wraps(real_write)
    def write_preloaded_data(transforms: Any, *args: Any, **kwargs: Any) -> Any:
        answer = real_write(transforms, *args, **kwargs)
        if answer is not None and isinstance(answer[1], OSError):
            # Megatron passes on no more than the kind of an exception that it is given as an answer.
            with disk_errors(Path(kwargs["write_bucket"][0]), "write"):
                raise answer[1]
        return answer

    @functools.wraps(real_prepare)
    def prepare_write_data(self: Any, plan: Any, planner: Any) -> None:
        real_prepare(self, plan, _WithoutCopies(planner))

    writer.write_preloaded_data = staticmethod(write_preloaded_data)
    writer.prepare_write_data = prepare_write_data


class _WithoutCopies:
    """A planner whose tensors fill their storage: Megatron copies those that are a part of a larger one."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner

    def resolve_data(self, item: Any) -> Any:
        data = self._planner.resolve_data(item)
        return filling_its_storage(data) if isinstance(data, torch.Tensor) else data


def filling_its_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the same memory, but with a storage that ends where they do.

    Args:
        tensor: On any device; one that has gaps, or is not on the CPU, is returned as it is.
    """
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    if tensor.untyped_storage().nbytes() == tensor.nbytes or not tensor.numel():
        return tensor
    # As bytes, which every format of numbers can be seen as.
    flat = torch.from_dlpack(tensor.view(-1).view(torch.uint8))
    return flat.view(tensor.dtype).view(tensor.shape)


def apart(request: Any) -> Any:
    """The request of Megatron's that a forked process is to write, which then minds its own business."""
    if request.async_fn is None:  # this rank has nothing to write
        return request
    return request._replace(async_fn=functools.partial(_write, request.async_fn, os.getpid()))


def ranges_of(request: Any) -> Ranges:
    """Where in this process's memory a request's tensors lie."""
    buckets = request.async_fn_args[1] if request.async_fn is not None else []
    return forking.ranges_of(tensor for _, _, (_, tensors) in buckets for _, tensor in tensors)


def _write(write: Callable[..., None], rank_pid: int, *args: Any, **kwargs: Any) -> None:
    """In the forked process."""
    # It goes when its rank does: what it has written then lies in ``saving`` and is removed.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank_pid:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the rank is told, and waits for it
    # Threads of a pool did not come along.
    torch.set_num_threads(1)
    write(*args, **kwargs)


@contextlib.contextmanager
def told_of(iteration: int | None) -> Iterator[None]:
    """Say of which checkpoint, and of which file of it, it is that writing has failed.

    Raises:
        UserError: On Megatron's and torch's exception for a rank, any rank, that could not write.
    """
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        said = [f"rank {rank}: {_cause(*failure)}" for rank, failure in sorted(error.failures.items())]
        what = f"cannot save the checkpoint of step {iteration}: {'; '.join(said) or OTHER_RANK}"
        raise UserError(what, hint="the checkpoints before it are whole", exit_code=1) from error


def _cause(error: BaseException, frames: Sequence[FrameSummary]) -> str:
    """What a writer has said, without what Megatron wraps it in."""
    text = str(error)
    if causes.helper_gone(error, frames):
        return causes.HELPER_GONE
    if isinstance(error, OSError) and error.strerror:
        return f"cannot write {error.filename or 'its file'}: {error.strerror}"
    found = re.search(r"cannot write .*", text)
    return (found[0] if found else text).partition("\n")[0] or type(error).__name__
