"""``launch=nodes`` on any node but node 0: join it, and run the ranks that it tells this one to."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import socket
import sys
import time
from pathlib import Path

import megaplug
from megaplug.commands.readiness import rank_environment
from megaplug.commands.resolved import check_job
from megaplug.errors import UserError
from megaplug.job.differences import differing, keys_of, read_keys, shown
from megaplug.job.freeze import FrozenJob, code_revision, read_frozen
from megaplug.job.schema import Job
from megaplug.launchers.agent import Agent
from megaplug.launchers.crew import Event
from megaplug.launchers.local import meeting_at, rank_variables
from megaplug.launchers.machine import detect_machine, machine_problems
from megaplug.launchers.nodes import read_key
from megaplug.launchers.slurm import node_of_step
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.wire import Message, RefusedError, Wire, greeted, join
from megaplug.runs.folder import RunFolder

_TRY_AGAIN_S = 1.0


def on_this_node(job: Job) -> Job:
    """The job with the number of nodes, and that of this one, as SLURM says where nothing else does."""
    launch = job.launch
    place = node_of_step(os.environ)
    if launch.kind != "nodes" or place is None:
        return job
    nnodes, node_rank = place
    launch = dataclasses.replace(
        launch,
        nnodes=nnodes if launch.nnodes is None else launch.nnodes,
        node_rank=node_rank if launch.node_rank is None else launch.node_rank,
    )
    return dataclasses.replace(job, launch=launch)


def serve(job: Job) -> int:
    """Join node 0 and stay until the job is over.

    Returns:
        The job's exit code, or 128 + N where signal N came before this node had joined.

    Raises:
        UserError: Node 0 does not answer, refuses this node or has gone, or its job is another one.
    """
    if problems := check_job(job):
        raise UserError.from_problems(problems)
    with StopSignals() as signals:
        connected = _connect(job, signals)
        if isinstance(connected, int):
            return connected
        wire, greeting = connected
        with wire:
            folder = RunFolder(Path(job.runs_dir) / _run_named(job, greeting))
            key = read_key(folder)
            frozen = read_frozen(folder.job_file)
            ranks_here = frozen.topology.world_size // (job.launch.nnodes or 1)
            if fault := _difference(job, frozen) or _lack(ranks_here, frozen):
                wire.send("leave", reason=fault)
                raise UserError(fault, hint="type the same command on all nodes, but for launch.node_rank")
            try:
                host = socket.gethostname()
                join(wire, key, greeting, node=job.launch.node_rank, nnodes=job.launch.nnodes, host=host)
            except RefusedError as error:
                raise UserError(f"node 0 refuses this one: {error}", exit_code=1) from error
            _tell(
                job, f"this is node {job.launch.node_rank} of {job.launch.nnodes}; node 0 is at {_place(job)}"
            )
            extra = rank_environment(frozen.job, folder)
            variables = rank_variables(extra, job.launch.omp_num_threads, ranks_here)
            command = [sys.executable, "-m", "megaplug.runtime", str(folder.job_file.resolve())]
            environment = meeting_at(wire.own_address) | variables
            agent = Agent(wire, folder, command, environment, lambda event: _show(job, event))
            return agent.serve(signals)


def _connect(job: Job, signals: StopSignals) -> tuple[Wire, Message] | int:
    """The connection to node 0 and its greeting, waited for; an exit code where a signal comes first."""
    deadline = time.monotonic() + job.launch.join_s
    address = (job.launch.master_addr, job.launch.master_port)
    is_told = False
    while True:
        try:
            wire = Wire(socket.create_connection(address, timeout=_TRY_AGAIN_S))
            try:
                return wire, greeted(wire)
            except RefusedError as error:
                wire.close()
                fault = str(error)
        except socket.gaierror as error:
            fault = f"{job.launch.master_addr!r} is not known here: {error.strerror}"
        except OSError as error:
            fault = str(error.strerror or error)
        if time.monotonic() >= deadline:
            waited = f"within {job.launch.join_s:g} s (launch.join_s)"
            raise UserError(
                f"node 0 at {_place(job)} was not reached {waited}: {fault}",
                hint="launch.master_addr is the address by which others reach node 0; is its launcher up?",
                exit_code=1,
            )
        if not is_told:
            _tell(job, f"waiting for node 0 at {_place(job)}: {fault}")
            is_told = True
        # Nothing tells when somebody begins to listen elsewhere.
        if select.select([signals.reader], [], [], _TRY_AGAIN_S)[0]:
            number = signals.pending()
            assert number is not None, "nothing else is written there"
            print(f"interrupted by {number.name} before node 0 was reached", file=sys.stderr)
            return 128 + number


def _run_named(job: Job, greeting: Message) -> str:
    """The folder's name that node 0 has said, if it can be this job's."""
    run = str(greeting.get("run"))
    if Path(run).name != run or not run.startswith(f"{job.name}-"):
        raise UserError(f"node 0 runs {run!r}, and this node was told of name={job.name}")
    return run


def _difference(job: Job, frozen: FrozenJob) -> str:
    """In what this node's job is not the one that node 0 runs; empty where it is."""
    here = f"{megaplug.__version__} {code_revision()}".rstrip()
    there = f"{frozen.megaplug_version} {frozen.revision}".rstrip()
    if here != there:
        return f"this node has megaplug {here}, and node 0 has {there}"
    own, of_node_0 = keys_of(job), read_keys(frozen.folder.job_file) or {}
    # What is left to the machine, or to the search, is decided by node 0.
    free = [key for key in ("device", "backend") if own.get(key) == "auto"]
    names = [name for name in differing([of_node_0, own]) if name not in free]
    if job.topology.auto:
        names = [name for name in names if not name.startswith("topology.")]
    values = ((name, shown(own.get(name)), shown(of_node_0.get(name))) for name in names[:4])
    said = "; ".join(f"{name}={here} here, {there} on node 0" for name, here, there in values)
    return f"this node's job is not that of node 0: {said}" if said else ""


def _lack(ranks_here: int, frozen: FrozenJob) -> str:
    """What this machine lacks for its ranks; empty where it lacks nothing."""
    problems = machine_problems(detect_machine(), ranks_here, 0, frozen.derived.device)
    return "; ".join(problem.message for problem in problems)


def _place(job: Job) -> str:
    return f"{job.launch.master_addr}:{job.launch.master_port}"


def _tell(job: Job, text: str) -> None:
    _show(job, {"event": "note", "text": text})


def _show(job: Job, event: Event) -> None:
    if job.launch.output == "json":
        print(json.dumps(event), flush=True)
    elif job.logging.progress != "none":
        print(event["text"], flush=True)
