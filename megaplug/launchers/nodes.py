"""The launchers of one job on several machines, as node 0 sees them: who has joined, and who is missing."""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from megaplug.errors import UserError
from megaplug.launchers.crew import Event
from megaplug.launchers.handshake import Guest, RefusedError, accept, printable, refuse
from megaplug.launchers.ports import listen
from megaplug.launchers.ranks import Share
from megaplug.launchers.remote import RemoteCrew
from megaplug.launchers.stops import SIGNALS, StopSignals
from megaplug.launchers.wire import Message, Wire
from megaplug.runs.atomic import disk_errors
from megaplug.runs.folder import RunFolder

_SAID_AGAIN_S = 30.0
_MAX_GUESTS = 256


class Nodes:
    """All nodes but this one. Each joins once, and stays from start to start of the ranks.

    Args:
        folder: The run; the key with which nodes prove that they see it is written there.
        number: How many nodes the job has, this one among them.
        per_node: Ranks of each.
        address: Of this machine, as the others reach it.
        port: At which they join.
        join_s: Seconds that are waited for the last of them.

    Raises:
        UserError: The port is in use, the address is not this machine's, or the key cannot be written.
    """

    def __init__(
        self, folder: RunFolder, number: int, per_node: int, address: str, port: int | None, join_s: float
    ) -> None:
        self.number = number
        self.per_node = per_node
        self._folder = folder
        self._join_s = join_s
        self._wires: dict[int, Wire] = {}
        self._names: dict[int, str] = {}
        self._key = _write_key(folder)
        self._listener = listen(address, port, everywhere=True)
        self._listener.setblocking(False)
        self.place = f"{address}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.dismiss(1, f"node 0 has failed: {error or type(error).__name__}")
        for wire in self._wires.values():
            wire.close()
        self._listener.close()

    @property
    def own_address(self) -> str:
        """The address at which others reach this machine."""
        return next(iter(self._wires.values())).own_address

    def missing(self) -> list[int]:
        """The nodes that have not joined, or have gone."""
        return [node for node in range(1, self.number) if not self._has_joined(node)]

    def complete(self, signals: StopSignals, tell: Callable[[Event], None], *, is_over: bool = False) -> str:
        """Wait until all nodes have joined.

        Args:
            signals: One that comes ends the wait, to this machine or to one that has joined; it is left for
                others to read.
            tell: Is told who has joined, and for whom is waited.
            is_over: They will have nothing to do, and need not ask whether they could.

        Returns:
            Why it has ended without them; empty where all are there.
        """
        deadline = time.monotonic() + self._join_s
        said_at = float("-inf")
        guests: list[Guest] = []
        try:
            while True:
                self._pass_on(signals)
                joined = sorted(self._wires)
                missing = self.missing()
                for node in joined:
                    if node in missing:
                        tell({"event": "note", "text": f"{self._names[node]} has gone"})
                if not missing:
                    return ""
                now = time.monotonic()
                if signals.pending() is not None:
                    return "signal"
                if now >= deadline:
                    return f"{_nodes(missing)} not joined within {self._join_s:g} s (launch.join_s)"
                if now - said_at >= _SAID_AGAIN_S:
                    tell({"event": "note", "text": f"{_nodes(missing)} not joined yet, at {self.place}"})
                    said_at = now
                until = min(deadline, said_at + _SAID_AGAIN_S, *(guest.deadline for guest in guests))
                wires = [*self._wires.values(), *(guest.wire for guest in guests)]
                ready = _readable([self._listener, signals.reader, *wires], max(0.0, until - now))
                if self._listener in ready and (guest := self._greet(is_over)) is not None:
                    guests.append(guest)
                for guest in [*guests]:
                    # Who says nothing must not keep out who comes later.
                    is_last = guest is guests[0] and len(guests) > _MAX_GUESTS
                    if note := self._met(guest, is_last=is_last):
                        guests.remove(guest)
                        tell({"event": "note", "text": note})
        finally:
            for guest in guests:
                guest.wire.close()

    def crews(self, world_size: int, port: int, shift: int) -> list[tuple[RemoteCrew, Share]]:
        """The other nodes' ranks, to be started; every node must have joined.

        Args:
            world_size: Ranks of the whole job.
            port: At which rank 0's store listens on this machine.
            shift: As of `Share`.
        """
        found = []
        for node in range(1, self.number):
            wire = self._wires[node]
            share = Share(world_size, node * self.per_node, self.per_node, wire.own_address, port, shift)
            found.append((RemoteCrew(wire, self._names[node]), share))
        return found

    def dismiss(self, exit_code: int, text: str) -> None:
        """Tell all that the job is over, and how."""
        for wire in self._wires.values():
            wire.send("over", exit_code=exit_code, text=text)

    def _has_joined(self, node: int) -> bool:
        wire = self._wires.get(node)
        if wire is not None and not wire.is_open():
            self._wires.pop(node).close()
        return node in self._wires

    def _pass_on(self, signals: StopSignals) -> None:
        """A scheduler may tell any machine of a job to stop; all else was said of ranks that are no more."""
        for wire in self._wires.values():
            for message in wire.receive():
                if message["kind"] == "asked to stop" and message.get("signal") in SIGNALS:
                    signals.pass_on(message["signal"], again=bool(message.get("again")))

    def _greet(self, is_over: bool) -> Guest | None:
        """The next in line; None where it has gone meanwhile."""
        try:
            connection, place = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return Guest(Wire(connection), str(place[0]), self._folder.name, is_over=is_over)

    def _met(self, guest: Guest, *, is_last: bool) -> str:
        """Let a guest that has answered join, or refuse it; a line for a person, empty while it is silent."""
        try:
            said = guest.answer(self._key)
            if said is None and not is_last:
                return ""
            if said is None:
                raise RefusedError("too many others have come, and it is silent")
            node, fault = self._judged(said)
            if fault:
                refuse(guest.wire, fault)
                raise RefusedError(fault)
        except RefusedError as error:
            guest.wire.close()
            return f"refused {guest.address}: {error}"
        accept(guest.wire, self._key, said)
        self._wires[node] = guest.wire
        self._names[node] = f"node {node} ({printable(said.get('host'))})"
        return f"{self._names[node]} has joined"

    def _judged(self, said: Message) -> tuple[int, str]:
        node, number = said.get("node"), said.get("nnodes")
        if number != self.number:
            return 0, f"it was started with launch.nnodes={number}, and node 0 with {self.number}"
        if not isinstance(node, int) or not 0 < node < self.number:
            return 0, f"there is no node {node} among {self.number}"
        if self._has_joined(node):
            return 0, f"{self._names[node]} has joined already"
        return node, ""


def read_key(folder: RunFolder) -> str:
    """The key.

    Raises:
        UserError: It cannot be read: the folder is not the one that node 0 sees.
    """
    path = folder.nodes_key
    try:
        return str(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}",
            hint="runs_dir must be a folder on a disk that all nodes share",
            exit_code=1,
        ) from error


def _write_key(folder: RunFolder) -> str:
    key, path = secrets.token_hex(32), folder.nodes_key
    with disk_errors(path, "write"):
        path.unlink(missing_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(key)
    return key


def _nodes(missing: list[int]) -> str:
    named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"node {named} has" if len(missing) == 1 else f"nodes {named} have"


def _readable(files: Sequence[socket.socket | Wire], wait_s: float) -> list[object]:
    """Those of some files that have something to read, waited for."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(wait_s)]
