"""``python launch/train.py`` as a process: its events are waited for, its ranks can be found and killed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from megaplug.runs.checkpoints import SAVING, list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import MANIFEST, verify_manifest
from megaplug.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
_POLL_S = 0.001

Event = dict[str, Any]


def train(
    *words: str, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Type a command and wait for its end."""
    return subprocess.run(
        _command(words), cwd=cwd, env=_environment(env), capture_output=True, text=True, timeout=timeout_s
    )


def about_runs(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Type ``launch/runs.py`` and wait for its end."""
    command = [sys.executable, str(ROOT / "launch" / "runs.py"), *words]
    return subprocess.run(
        command, cwd=ROOT, env=_environment(env), capture_output=True, text=True, timeout=120.0
    )


def started(words: Sequence[str], prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Type a command, and do not wait.

    Args:
        words: Its overrides.
        prefix: A command that runs it, such as ``nsenter ...``.
    """
    return subprocess.Popen(
        [*prefix, *_command(words)],
        cwd=ROOT,
        env=_environment(None),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / "train.py"), *words]


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}


class Live:
    """A started command that reports as JSON.

    Args:
        words: Its overrides.
        prefix: A command that runs it, such as ``nsenter ...``.
    """

    def __init__(self, words: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.events: list[Event] = []
        self._arriving: queue.Queue[Event | None] = queue.Queue()
        self.process = started([*words, "launch.output=json"], prefix)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._arriving.put(json.loads(line) if line.startswith("{") else {"event": "text", "text": line})
        self._arriving.put(None)

    def until(self, holds: Callable[[Event], bool], timeout_s: float = 90.0) -> Event:
        """The first event from now on for which something holds."""
        deadline = time.monotonic() + timeout_s
        while True:
            event = self._arriving.get(timeout=max(0.001, deadline - time.monotonic()))
            if event is None:
                raise AssertionError(f"the command has ended: {self.events[-1:]} {self.stderr()}")
            self.events.append(event)
            if holds(event):
                return event

    def until_step(self, iteration: int) -> Event:
        """Until a training step is reported, or a later one."""
        return self.until(lambda event: event["event"] == "step" and event["iteration"] >= iteration)

    def end(self, timeout_s: float = 120.0) -> int:
        """Wait for the command's end and return its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        while (event := self._arriving.get(timeout=timeout_s)) is not None:
            self.events.append(event)
        return code

    def stderr(self) -> str:
        """What it has said there; only after its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def of(self, kind: str) -> list[Event]:
        """The events of one kind so far."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def summary(self) -> Event:
        """The last event of a command that came to its end."""
        return self.of("summary")[-1]

    def rank_pids(self) -> dict[int, int]:
        """The ranks that live, by number."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, KeyError):
                found[int(child.environ()["RANK"])] = child.pid
        return found

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind when a test fails: the ranks end with their supervisor."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                self._reader.join(30.0)
                stream.close()


def processes_of(folder: RunFolder) -> list[int]:
    """Every process of a run's ranks, Megatron's forked helpers included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and str(folder.job_file.resolve()) in process.cmdline()
            ):
                found.append(process.pid)
    return found


def await_nobody(folder: RunFolder, timeout_s: float = 15.0) -> None:
    """Until no process of a run lives."""
    deadline = time.monotonic() + timeout_s
    while left := processes_of(folder):
        assert time.monotonic() < deadline, f"processes {left} of {folder.path} outlive their supervisor"
        time.sleep(0.02)


def await_save_begun(folder: RunFolder, timeout_s: float = 60.0) -> Path:
    """Until the next checkpoint that is being written appears; no event tells of that."""
    place = folder.checkpoints / SAVING
    known = {found.path for found in list_checkpoints(place)}
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for found in reversed(list_checkpoints(place)):
            if found.path not in known:
                return found.path
        time.sleep(_POLL_S)
    raise AssertionError(f"nothing was saved in {folder.checkpoints}")


def await_save(folder: RunFolder) -> float:
    """Until the next checkpoint is whole; returns the seconds from its folder to its name."""
    being_written = await_save_begun(folder)
    began = time.monotonic()
    while not (folder.checkpoints / being_written.name).exists():
        assert time.monotonic() < began + 60.0, f"{being_written} is never completed"
        time.sleep(_POLL_S)
    return time.monotonic() - began


def newest_whole(folder: RunFolder) -> int:
    """The step of the newest checkpoint that its manifest confirms; 0 where there is none."""
    whole = [
        found.iteration for found in list_checkpoints(folder.checkpoints) if not verify_manifest(found.path)
    ]
    return max(whole, default=0)


def half_written(folder: RunFolder) -> list[int]:
    """The steps whose save was begun and never completed; what has a name is whole."""
    named = list_checkpoints(folder.checkpoints)
    assert all((found.path / MANIFEST).exists() for found in named), named
    return [found.iteration for found in list_checkpoints(folder.checkpoints / SAVING)]


def joined_curve(folder: RunFolder) -> list[tuple[Any, ...]]:
    """What was measured, as it stands in the file: steps and validations, unrounded."""
    return [
        (line["iteration"], line["loss"], line["grad_norm"], line["lr"])
        if "loss" in line
        else (line["iteration"], line["split"], line["valid_loss"])
        for line in read_metrics(folder.metrics_file)
    ]


def only_run(runs_dir: Path) -> RunFolder:
    """The one folder of a test's runs."""
    (folder,) = runs_dir.iterdir()
    return RunFolder(folder)


def await_run(runs_dir: Path, timeout_s: float = 60.0) -> RunFolder:
    """The one folder, as soon as a command has made it."""
    deadline = time.monotonic() + timeout_s
    while not (runs_dir.is_dir() and list(runs_dir.iterdir())):
        assert time.monotonic() < deadline, f"{runs_dir} stays empty"
        time.sleep(_POLL_S)
    return only_run(runs_dir)
