"""Several machines on one: a leader and agents as processes, and ranks that are little programs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fake_ranks import PRELUDE, FakeJob

from megaplug.launchers.local import run
from megaplug.launchers.nodes import Nodes
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.supervisor import Patience
from megaplug.launchers.verdict import Outcome

# What `megaplug.commands.node` does, without a job.
_AGENT = """
import os, select, signal, socket, sys
from pathlib import Path
from megaplug.errors import UserError
from megaplug.launchers.agent import Agent
from megaplug.launchers.handshake import RefusedError, greeted, join
from megaplug.launchers.nodes import read_key
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.wire import Wire
from megaplug.runs.folder import RunFolder
_, node, number, place, folder, *command = sys.argv
folder = RunFolder(Path(folder))
address, _, port = place.rpartition(":")
try:
    with StopSignals() as signals, Wire(socket.create_connection((address, int(port)))) as wire:
        while (greeting := greeted(wire)) is None:
            select.select([wire], [], [])
        assert greeting["run"] == folder.name
        join(wire, read_key(folder), greeting, node=int(node), nnodes=int(number), host="host" + node)
        agent = Agent(wire, folder, command, os.environ, lambda event: print(event["text"], flush=True))
        sys.exit(agent.serve(signals))
except RefusedError as error:
    print("refused:", error)
    sys.exit(1)
except UserError as error:
    print("error:", error.message)
    sys.exit(error.exit_code)
"""
_LEADER = """
import json, sys
from pathlib import Path
from megaplug.launchers.local import run
from megaplug.launchers.nodes import Nodes
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.supervisor import Patience
from megaplug.runs.folder import RunFolder
_, folder, grace_s, *command = sys.argv
folder = RunFolder(Path(folder))
def tell(event):
    print(event["event"], event.get("text", ""), flush=True)
with StopSignals() as signals, Nodes(folder, 2, 1, "127.0.0.1", None, 30.0) as nodes:
    print(nodes.place, flush=True)
    nodes.complete(signals, tell)
    outcome = run(command, folder, 2, grace_s=float(grace_s), on_event=tell, signals=signals, nodes=nodes,
                  patience=Patience(report_s=1.0, teardown_s=0.5))
    nodes.dismiss(outcome.exit_code, outcome.status + ": " + outcome.reason)
print(outcome.status, outcome.reason, flush=True)
sys.exit(outcome.exit_code)
"""


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()), server.accept()[0]


class FakeNodes(FakeJob):
    """A job on several nodes. Whatever was started is killed by `end`.

    Attributes:
        agents: The launchers of nodes 1, 2 and so on.
        notes: What was told while nodes joined.
    """

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.agents: list[subprocess.Popen[str]] = []
        self.notes: list[str] = []
        self._others: list[subprocess.Popen[str]] = []

    def agent(
        self, node: int, place: str, script: str, number: int = 2, command: Sequence[str] = (), **more: str
    ) -> subprocess.Popen[str]:
        """Start the launcher of a node.

        Args:
            node: Which.
            place: Of the leader, as `Nodes.place`.
            script: What its ranks do.
            number: Of nodes.
            command: What its ranks execute instead.
            more: Variables for it and its ranks.
        """
        words = [_AGENT, str(node), str(number), place, str(self.folder.path)]
        process = self._started([*words, *(command or [sys.executable, "-c", PRELUDE + script])], more)
        self.agents.append(process)
        return process

    def lead(
        self,
        script: str,
        per_node: int = 1,
        number: int = 2,
        when: Callable[[dict], None] = lambda event: None,
        agent_command: Sequence[str] = (),
        reached_at: str = "127.0.0.1",
        **options,
    ) -> Outcome:
        """Run a job, led from this process.

        Args:
            script: What all ranks do.
            per_node: Ranks of each node.
            number: Of nodes.
            when: Is told every event, and may do something to somebody.
            agent_command: What the ranks of the other nodes execute instead.
            reached_at: The address of this machine, as the others know it.
            options: For `run`.
        """

        def tell(event: dict) -> None:
            self.events.append(event)
            when(event)

        options.setdefault("patience", Patience(report_s=1.0, teardown_s=0.5))
        with StopSignals() as signals, self.nodes(number, per_node) as nodes:
            for node in range(1, number):
                place = f"{reached_at}:{nodes.place.rpartition(':')[2]}"
                self.agent(node, place, script, number, agent_command)
            assert nodes.complete(signals, lambda event: self.notes.append(event["text"])) == ""
            command = [sys.executable, "-c", PRELUDE + script]
            world_size = per_node * number
            options |= {"on_event": tell, "env": self.env, "signals": signals, "nodes": nodes}
            outcome = run(command, self.folder, world_size, **options)
            nodes.dismiss(outcome.exit_code, f"{outcome.status}: {outcome.reason}")
        return outcome

    def nodes(
        self, number: int = 2, per_node: int = 1, join_s: float = 30.0, address: str = "127.0.0.1"
    ) -> Nodes:
        """Where the others join."""
        return Nodes(self.folder, number, per_node, address, None, join_s)

    def start_leader(self, script: str, grace_s: float = 30.0) -> subprocess.Popen[str]:
        """Lead from another process, with one agent; both are there when this returns."""
        command = [sys.executable, "-c", PRELUDE + script]
        leader = self._started([_LEADER, str(self.folder.path), str(grace_s), *command], {})
        assert leader.stdout is not None
        self.agent(1, leader.stdout.readline().strip(), script)
        return leader

    def of(self, kind: str) -> list[dict]:
        """The events of one kind, in the order of the ranks."""
        found = [event for event in self.events if event["event"] == kind]
        return sorted(found, key=lambda event: event["rank"])

    def end(self) -> None:
        """Kill what still lives; ranks end with their launchers."""
        for process in self._others:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _started(self, words: Sequence[str], more: dict[str, str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", *words],
            env=os.environ | self.env | more,
            stdout=subprocess.PIPE,
            text=True,
            # A test run in a shell's background ignores Ctrl-C, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self._others.append(process)
        return process


def read_until(process: subprocess.Popen[str], line: str) -> None:
    """Read what a process prints until it has printed a line that begins so."""
    assert process.stdout is not None
    while not (text := process.stdout.readline()).startswith(line):
        assert text, f"it ended before it said {line!r}"


def ended(process: subprocess.Popen[str], timeout_s: float = 20.0) -> tuple[int, str]:
    """The exit code of a process, and the last line that it has printed."""
    out, _ = process.communicate(timeout=timeout_s)
    return process.returncode, out.splitlines()[-1] if out else ""
