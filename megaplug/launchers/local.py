"""Start a job on this machine, and on others whose launchers have joined this one.

torchrun is not used: its agent kills ranks 30 s after a signal, and saving a large model takes longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from megaplug.launchers.crew import Crew, Event, LocalCrew
from megaplug.launchers.interfaces import VARIABLES, interface_of
from megaplug.launchers.machine import detect_machine
from megaplug.launchers.nodes import Nodes
from megaplug.launchers.ports import listen
from megaplug.launchers.ranks import Share
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.supervisor import Patience, Supervisor
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
    nodes: Nodes | None = None,
) -> Outcome:
    """Run a job's ranks to their end and write ``state.json``. Call it from the main thread.

    SIGINT, SIGTERM, SIGHUP and SIGUSR2 send SIGTERM to every rank, which saves and leaves; after ``grace_s``
    seconds, or at a further SIGINT, everything is killed.

    Args:
        command: What each rank executes.
        folder: The run; logs and the state go there.
        world_size: Number of ranks, those of other nodes among them.
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
        nodes: The other machines, all of which have joined; None for this one alone.

    Returns:
        What has happened. A rank that fails is an outcome, not an exception.

    Raises:
        UserError: If the port is in use, or the ranks cannot be started.
    """
    # At `launch.master_port` the nodes of a job have joined; its ranks meet elsewhere.
    listener = listen(address, None if nodes else port, everywhere=nodes is not None)
    supervisor = Supervisor(folder, grace_s, on_event, patience or Patience(), iters, iteration)
    supervisor.restarted(restart_reasons)
    own = world_size if nodes is None else nodes.per_node
    environment = rank_variables(env or {}, omp_num_threads, own)
    if nodes is not None:
        environment = meeting_at(nodes.own_address) | environment
    with listener, nullcontext(signals) if signals else StopSignals() as heard:
        bound, port = listener.getsockname()[:2]
        here = Share(world_size, 0, own, bound if nodes is None else nodes.own_address, port, shift)
        crews: list[tuple[Crew, Share]] = [(LocalCrew(command, folder, lock_fd, environment), here)]
        crews += nodes.crews(world_size, port, shift) if nodes is not None else []
        return supervisor.run(crews, listener, heard)


def rank_variables(extra: Mapping[str, str], omp_num_threads: int | None, ranks_here: int) -> dict[str, str]:
    """The environment of every rank of this machine, but for what names the rank.

    Args:
        extra: Added to this process's own.
        omp_num_threads: Threads a rank; None for what the environment says, else an equal share of the CPUs.
        ranks_here: How many share them.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    environment |= extra
    if omp_num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(omp_num_threads)
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, detect_machine().cpu_count // ranks_here)))
    environment.setdefault("PYTHONUNBUFFERED", "1")  # the last lines before a crash are the ones that count
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    return environment


def meeting_at(own_address: str) -> dict[str, str]:
    """How gloo and NCCL find the other nodes: by the interface on which the launchers talk.

    Without it gloo takes what the host's name stands for, which on many systems is 127.0.1.1.

    Args:
        own_address: Of this machine, on the way to the others.
    """
    name = interface_of(own_address)
    return {} if name is None else dict.fromkeys(VARIABLES, name)
