"""Start a job on this machine.

torchrun is not used: its agent kills ranks 30 s after a signal, and saving a large model takes longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from megaplug.launchers.machine import detect_machine
from megaplug.launchers.ports import listen
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.supervisor import Event, Patience, Supervisor
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
    signals: StopSignals | None = None,
) -> Outcome:
    """Run a job's ranks to their end and write ``state.json``. Call it from the main thread.

    SIGINT, SIGTERM, SIGHUP and SIGUSR2 send SIGTERM to every rank, which saves and leaves; after ``grace_s``
    seconds, or at a further SIGINT, everything is killed.

    Args:
        command: What each rank executes.
        folder: The run; logs and the state go there.
        world_size: Number of ranks.
        lock_fd: Of the run's `RunLock`; the ranks inherit it.
        env: Added to this process's environment for every rank.
        grace_s: Seconds after a signal in which the ranks finish their step, save and leave.
        address: Where rank 0 listens.
        port: The master port; None for a free one.
        omp_num_threads: Threads a rank; None for what the environment says, else an equal share of the CPUs.
        iters: The step at which the run is finished, for the state.
        iteration: The step of the checkpoint it starts from, for the state.
        on_event: Is told every event but ``end``, with the number of its ``rank``.
        patience: Other waiting times.
        restart_reasons: Why the ranks had to be started again so far, for the state.
        shift: So many places further on is the device of each rank: another than before a restart.
        signals: What hears them, where they are to be heard before and after, too.

    Returns:
        What has happened. A rank that fails is an outcome, not an exception.

    Raises:
        UserError: If the port is in use, or the ranks cannot be started.
    """
    listener = listen(address, port)
    supervisor = Supervisor(folder, grace_s, on_event, patience or Patience(), iters, iteration)
    supervisor.restarted(restart_reasons, shift)
    environment = _environment(env or {}, omp_num_threads, world_size)
    with listener, nullcontext(signals) if signals else StopSignals() as heard:
        return supervisor.run(command, world_size, listener, lock_fd, environment, heard)


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
