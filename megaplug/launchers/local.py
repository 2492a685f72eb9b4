"""Start a job on this machine.

torchrun is not used: its agent kills ranks 30 s after a signal, and saving a large model takes longer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence

from megaplug.launchers.machine import detect_machine
from megaplug.launchers.ports import listen
from megaplug.launchers.supervisor import SIGNALS, Event, Patience, Supervisor
from megaplug.launchers.verdict import Outcome
from megaplug.runs.folder import RunFolder


def run(
    command: Sequence[str],
    folder: RunFolder,
    world_size: int,
    *,
    lock_fd: int | None = None,
    env: Mapping[str, str] | None = None,
    grace_s: float = 120.0,
    address: str = "127.0.0.1",
    port: int | None = None,
    omp_num_threads: int | None = None,
    iters: int = 0,
    iteration: int = 0,
    on_event: Callable[[Event], None] | None = None,
    patience: Patience | None = None,
    restart_reasons: Sequence[str] = (),
    shift: int = 0,
    signals: socket.socket | None = None,
) -> Outcome:
    """Run a job's ranks to their end and write ``state.json``. Call it from the main thread.

    SIGINT, SIGTERM and SIGHUP send SIGTERM to every rank, which saves and leaves; after ``grace_s`` seconds,
    or at a second signal, everything is killed.

    Args:
        command: What each rank executes.
        folder: The run; logs and the state go there.
        world_size: Number of ranks.
        lock_fd: Of the run's `RunLock`; the ranks inherit it.
        env: Added to this process's environment for every rank.
        grace_s: Seconds that the ranks have to save after a signal.
        address: Where rank 0 listens.
        port: The master port; None for a free one.
        omp_num_threads: Threads a rank; None for what the environment says, else an equal share of the CPUs.
        iters: The step at which the run is finished, for the state.
        iteration: The step of the checkpoint it starts from, for the state.
        on_event: Is told every event but ``end``, with the number of its ``rank``.
        patience: Other waiting times.
        restart_reasons: Why the ranks had to be started again so far, for the state.
        shift: So many places further on is the device of each rank: another than before a restart.
        signals: From `heard_signals`, where they are to be heard before and after, too.

    Returns:
        What has happened. A rank that fails is an outcome, not an exception.

    Raises:
        UserError: If the port is in use, or the ranks cannot be started.
    """
    listener = listen(address, port)
    supervisor = Supervisor(folder, grace_s, on_event, patience or Patience(), iters, iteration)
    supervisor.restarted(restart_reasons, shift)
    environment = _environment(env or {}, omp_num_threads, world_size)
    with listener, contextlib.nullcontext(signals) if signals else heard_signals() as heard:
        return supervisor.run(command, world_size, listener, lock_fd, environment, heard)


def waiting_signal(signals: socket.socket) -> signal.Signals | None:
    """The first of the signals that end a job which has come and is not yet taken; it stays there."""
    try:
        numbers = signals.recv(64, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    return next((signal.Signals(number) for number in numbers if number in SIGNALS), None)


def _environment(extra: Mapping[str, str], omp_num_threads: int | None, world_size: int) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    environment |= extra
    if omp_num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(omp_num_threads)
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, detect_machine().cpu_count // world_size)))
    environment.setdefault("PYTHONUNBUFFERED", "1")  # the last lines before a crash are the ones that count
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    return environment


@contextlib.contextmanager
def heard_signals() -> Iterator[socket.socket]:
    """Signals arrive as bytes on a socket, so that one `select` waits for everything; restored afterwards."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    # What was ignored stays ignored: nohup ignores SIGHUP, a shell's background job ignores SIGINT.
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
