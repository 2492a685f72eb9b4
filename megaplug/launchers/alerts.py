"""A command and a webhook that are told what has happened to a run; what becomes of them never changes it.

They are told one event after the other, beside the run, each within a time limit. A command runs in a process
group of its own, which is ended with its time, and with this process however that ends.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import megaplug
from megaplug.runs.atomic import strict_json

PREFIX = "MEGAPLUG_ALERT_"
# What runs a command so that it ends with this process, too.
_GUARD = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from megaplug.runs import watchdog; watchdog.main()"
)
_ROOT = str(Path(megaplug.__file__).resolve().parent.parent)


class Alerts:
    """Where events of a run are sent.

    Args:
        command: For ``/bin/sh``; gets the event as JSON on its stdin, and its values in the environment as
            ``MEGAPLUG_ALERT_<KEY>``. None for no command.
        webhook: An HTTP address to which the event is posted as JSON; None for none. It is never shown.
        on: The kinds of events that are sent.
        timeout_s: Seconds that each may take.
    """

    def __init__(
        self, command: str | None, webhook: str | None, on: Collection[str], timeout_s: float
    ) -> None:
        self._command = command
        self._webhook = webhook
        self._on = frozenset(on)
        self._timeout_s = timeout_s
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._faults: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._sent = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._done, self._end_of_thread = socket.socketpair()

    def send(self, event: Mapping[str, Any]) -> None:
        """Have an event sent if its kind is one that is, and do not wait for it."""
        if event["event"] not in self._on or (self._command is None and self._webhook is None):
            return
        self._sent += 1
        self._events.put(dict(event))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
            self._thread.start()

    def faults(self) -> list[str]:
        """One line for each alert that has failed since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._faults.get_nowait())
        return found

    def finish(self, signals: socket.socket | None = None) -> list[str]:
        """Wait until everything is sent, or its time is over, or a signal comes; returns the last `faults`.

        Args:
            signals: Becomes readable when a signal comes.
        """
        if self._thread is not None:
            self._events.put(None)
            heard = [self._done] if signals is None else [self._done, signals]
            ready, _, _ = select.select(heard, [], [], 2 * self._timeout_s * self._sent + 1.0)
            if self._done not in ready:
                self._faults.put("alerts: not all were sent, nor waited for any longer")
        return self.faults()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what still runs."""
        process, self._command, self._webhook = self._process, None, None
        if process is not None:
            _kill(process)

    def _work(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                content = (json.dumps(strict_json(event), allow_nan=False) + "\n").encode()
                if self._command is not None and (fault := self._run(self._command, event, content)):
                    self._faults.put(f"alerts.command failed at {event['event']}: {fault}")
                if self._webhook is not None and (fault := _post(self._webhook, content, self._timeout_s)):
                    self._faults.put(f"alerts.webhook failed at {event['event']}: {fault}")
        finally:
            self._end_of_thread.close()

    def _run(self, command: str, event: Mapping[str, Any], content: bytes) -> str:
        """What has gone wrong with the command; empty where nothing has."""
        try:
            return self._ran(command, event, content)
        except OSError as error:  # there may be no room for what it is told, or for what it says
            return str(error.strerror or error)

    def _ran(self, command: str, event: Mapping[str, Any], content: bytes) -> str:
        """As `_run`.

        Raises:
            OSError: It cannot be started, or told.
        """
        values = {key: value for key, value in event.items() if isinstance(value, str | int | float)}
        environment = {f"{PREFIX}{key.upper()}": str(value) for key, value in values.items()}
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
            told.write(content)
            told.seek(0)
            parent_read, parent_write = os.pipe()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _GUARD, _ROOT, str(parent_read), command],
                    stdin=told,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    pass_fds=[parent_read],
                    process_group=0,
                )
                in_time = _ends(self._process, self._timeout_s)
                code = _kill(self._process)
            finally:
                self._process = None
                os.close(parent_read)
                os.close(parent_write)
            if not in_time:
                return f"it was ended after {self._timeout_s:g} s (alerts.timeout_s)"
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit code {code}{f': {last[:200]}' if last else ''}" if code else ""


def _ends(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether a process ends in time; it is not reaped, so that its group's number is not another's."""
    pidfd = os.pidfd_open(process.pid)
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """End a command and all that it has started, unless that has gone elsewhere; returns its exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _post(url: str, content: bytes, timeout_s: float) -> str:
    """What has gone wrong with the request, without the address; empty where nothing has. Tried once."""
    request = urllib.request.Request(
        url, data=content, headers={"Content-Type": "application/json", "User-Agent": "megaplug"}
    )
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return ""
    except urllib.error.HTTPError as error:
        return f"the answer was {error.code} {error.reason}"
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"no answer within {time.monotonic() - began:.0f} s (alerts.timeout_s)"
        return str(getattr(reason, "strerror", None) or type(reason).__name__)
