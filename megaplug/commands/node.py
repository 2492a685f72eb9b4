"""``launch=nodes`` on any node but node 0: join it, and run the ranks that it tells this one to."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import megaplug
from megaplug.commands import cli
from megaplug.commands.readiness import rank_environment
from megaplug.commands.resolved import check_job
from megaplug.errors import UserError
from megaplug.job.differences import differing, keys_of, read_keys, shown
from megaplug.job.freeze import FrozenJob, code_revision, read_frozen
from megaplug.job.schema import Job
from megaplug.launchers.agent import Agent
from megaplug.launchers.crew import Event
from megaplug.launchers.handshake import RefusedError, greeted, join, printable
from megaplug.launchers.local import meeting_at, rank_variables
from megaplug.launchers.machine import detect_machine, machine_problems
from megaplug.launchers.nodes import read_key
from megaplug.launchers.slurm import node_of_step
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.wire import Message, Wire
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
            try:
                agent = _agent(job, wire, greeting)
            except UserError as error:
                wire.send("leave", reason=error.message)
                raise
            return agent.serve(signals)


def _agent(job: Job, wire: Wire, greeting: Message) -> Agent:
    """What serves node 0, which has taken this node in."""
    folder = RunFolder(Path(job.runs_dir) / _run_named(job, greeting))
    key = read_key(folder)
    command: list[str] = []
    environment: dict[str, str] = {}
    # Nothing is asked of the job where nothing is to be done for it.
    if not greeting.get("is_over"):
        frozen = read_frozen(folder.job_file)
        ranks_here = frozen.topology.world_size // (job.launch.nnodes or 1)
        if fault := _difference(job, frozen):
            raise UserError(fault, hint="type the same command on all nodes, but for launch.node_rank")
        if lacks := machine_problems(detect_machine(), ranks_here, 0, frozen.derived.device):
            raise UserError(f"node {job.launch.node_rank}: {lacks[0].message}", hint=lacks[0].hint)
        command = [sys.executable, "-m", "megaplug.runtime", str(folder.job_file.resolve())]
        extra = rank_environment(frozen.job, folder)
        environment = rank_variables(extra, job.launch.omp_num_threads, ranks_here)
    try:
        host = socket.gethostname()
        join(wire, key, greeting, node=job.launch.node_rank, nnodes=job.launch.nnodes, host=host)
    except RefusedError as error:
        raise UserError(f"node 0 refuses this one: {error}", exit_code=1) from error
    _tell(job, f"this is node {job.launch.node_rank} of {job.launch.nnodes}; node 0 is at {_place(job)}")
    environment = meeting_at(wire.own_address) | environment
    return Agent(wire, folder, command, environment, lambda event: cli.tell(partial(_show, job), event))


def _connect(job: Job, signals: StopSignals) -> tuple[Wire, Message] | int:
    """The connection to node 0 and its greeting, waited for; an exit code where a signal comes first."""
    deadline = time.monotonic() + job.launch.join_s
    address = (job.launch.master_addr, job.launch.master_port)
    wire: Wire | None = None
    is_told = False
    while True:
        try:
            wire = wire or Wire(socket.create_connection(address, timeout=_TRY_AGAIN_S))
            if (greeting := greeted(wire)) is not None:
                return wire, greeting
            fault = "it takes no nodes in yet"
        except RefusedError as error:
            assert wire is not None
            wire.close()
            wire, fault = None, str(error)
        except (socket.gaierror, UnicodeError):
            fault = f"{job.launch.master_addr!r} is not known here"
        except OSError as error:
            fault = str(error.strerror or error)
        number, rest = signals.pending(), deadline - time.monotonic()
        if wire is not None and (number is not None or rest <= 0):
            wire.close()
        if number is not None:
            print(f"interrupted by {number.name} before node 0 was reached", file=sys.stderr)
            return 128 + number
        if rest <= 0:
            waited = f"within {job.launch.join_s:g} s (launch.join_s)"
            raise UserError(
                f"node 0 at {_place(job)} was not reached {waited}: {fault}",
                hint="launch.master_addr is the address by which others reach node 0; is its launcher up?",
                exit_code=1,
            )
        # Nothing tells when somebody begins to listen elsewhere.
        watched: list[Any] = [signals.reader] if wire is None else [signals.reader, wire]
        if not select.select(watched, [], [], min(_TRY_AGAIN_S, rest))[0] and not is_told:
            _tell(job, f"waiting for node 0 at {_place(job)}: {fault}")
            is_told = True


def _run_named(job: Job, greeting: Message) -> str:
    """The folder's name that node 0 has said, if it can be this job's."""
    run = str(greeting.get("run"))
    if not re.fullmatch(re.escape(job.name) + "-[0-9a-z-]+", run):
        raise UserError(f"node 0 runs {printable(run)}, and this node was told of name={job.name}")
    return run


def _difference(job: Job, frozen: FrozenJob) -> str:
    """In what this node's job is not the one that node 0 runs; empty where it is."""
    here = f"{megaplug.__version__} {code_revision()}".rstrip()
    there = f"{frozen.megaplug_version} {frozen.revision}".rstrip()
    if here != there:
        return f"node {job.launch.node_rank} has megaplug {here}, and node 0 has {there}"
    own, of_node_0 = keys_of(job), read_keys(frozen.folder.job_file) or {}
    # What is left to the machine, or to the search, is decided by node 0.
    free = [key for key in ("device", "backend") if own.get(key) == "auto"]
    names = [name for name in differing([of_node_0, own]) if name not in free]
    if job.topology.auto:
        names = [name for name in names if not name.startswith("topology.")]
    this = f"node {job.launch.node_rank}"
    values = ((name, shown(own.get(name)), shown(of_node_0.get(name))) for name in names[:4])
    said = "; ".join(f"{name} is {here} on {this} and {there} on node 0" for name, here, there in values)
    return f"the job of {this} is not that of node 0: {said}" if said else ""


def _place(job: Job) -> str:
    return f"{job.launch.master_addr}:{job.launch.master_port}"


def _tell(job: Job, text: str) -> None:
    cli.tell(partial(_show, job), {"event": "note", "text": text})


def _show(job: Job, event: Event) -> None:
    if job.launch.output == "json":
        print(json.dumps(event), flush=True)
    elif job.logging.progress != "none":
        print(event["text"], flush=True)
