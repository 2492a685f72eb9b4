"""Starts gloo ranks from one parent that has imported everything, and shows what each said when one fails.

The parent is Python's own fork server: it imports torch and Megatron once, so that a rank costs a fork and
not seven seconds. Each set of ranks is one process group and is ended as one when its time is up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "megatron.training.training",
    "megatron.training.arguments",
    "megatron.core.models.gpt",
    "megaplug.runtime.pretrain",
    "megaplug.runtime.batch",
]
_context = multiprocessing.get_context("forkserver")


def start_parent() -> None:
    """Name what the fork server imports; it starts with the first rank."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        TORCH_COMPILE_DISABLE="1",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    _context.set_forkserver_preload(PRELOAD)


class RanksFailed(AssertionError):
    """At least one rank raised, died or took too long; the message holds every rank's output."""


def run_ranks(
    world_size: int, target: Callable[..., Any], *args: Any, folder: Path, timeout_s: float = 120.0
) -> list[Any]:
    """Run ``target(*args)`` on every rank of a new gloo world and return what each rank returned.

    Args:
        world_size: How many ranks.
        target: A module-level function; it finds its rank in ``RANK``.
        folder: An empty folder for the ranks' output and answers.
        timeout_s: After so many seconds the whole process group is killed.

    Raises:
        RanksFailed: With the output of every rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(2 * world_size)
        port = listening.getsockname()[1]
        ranks = []
        for rank in range(world_size):
            store = listening if rank == 0 else None
            arguments = (rank, world_size, port, store, str(folder), target, args)
            ranks.append(_context.Process(target=_rank, args=arguments, daemon=False))
        try:
            for process in ranks:
                process.start()
            _await(ranks, timeout_s)
        finally:
            _end(ranks, folder)
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    if failed:
        raise RanksFailed(_report(failed, ranks, folder))
    return [pickle.loads((folder / f"answer{rank}.pkl").read_bytes()) for rank in range(world_size)]  # noqa: S301


def _await(ranks: list[Any], timeout_s: float) -> None:
    """Until all ranks have ended, one has failed, or the time is up."""
    deadline = time.monotonic() + timeout_s
    running = list(ranks)
    while running:
        left = deadline - time.monotonic()
        if left <= 0 or not wait([process.sentinel for process in running], timeout=left):
            return
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode != 0:
                # The others may still say why; then they are killed.
                deadline = min(deadline, time.monotonic() + 3.0)


def _end(ranks: list[Any], folder: Path) -> None:
    """Kill what is left of each rank's process group: Megatron's managers outlive a killed rank."""
    for rank, process in enumerate(ranks):
        if process.pid is not None and (folder / f"group{rank}").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.pid is not None:
            process.join()


def _report(failed: list[int], ranks: list[Any], folder: Path) -> str:
    lines = [f"rank {rank} ended with {ranks[rank].exitcode}" for rank in failed]
    for rank in range(len(ranks)):
        log = folder / f"rank{rank}.log"
        text = log.read_text(errors="replace") if log.exists() else "(no output)"
        lines.append(f"--- rank {rank} ---\n" + "\n".join(text.splitlines()[-60:]))
    return "\n".join(lines)


def _rank(
    rank: int, world_size: int, port: int, store: socket.socket | None, folder: str, target: Any, args: Any
) -> None:
    """The forked rank: its own process group, environment and output, then the target."""
    os.setpgid(0, 0)
    Path(folder, f"group{rank}").touch()
    log = os.open(Path(folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    if store is not None:
        os.environ["MEGAPLUG_STORE_FD"] = str(store.detach())
    try:
        answer = target(*args)
    except BaseException:  # noqa: BLE001  shown, and told by the exit code
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    Path(folder, f"answer{rank}.pkl").write_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
