"""Fake ranks: little programs that speak the event protocol, in place of Megatron."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megaplug.launchers.local import run
from megaplug.launchers.supervisor import Patience
from megaplug.runs.folder import create_next

REPOSITORY = Path(__file__).resolve().parents[2]

PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from megaplug.runs import watchdog
from megaplug.runs.events import EventWriter
watchdog.start_from_environment()
rank = int(os.environ["RANK"])
here = Path(os.environ["FAKE_DIR"])
events = EventWriter.from_environment()
"""
# As a rank that has done a step.
CAN_SAVE = """
events.write("step", iteration=5)
events.write("can save")
"""
SAVES = (
    CAN_SAVE
    + """
def leave(*_):
    events.write("saved", iteration=5, seconds=0.0)
    events.write("end", status="stopped", iteration=5)
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
"""
)
# Its save is done when there is a file of this name; for that nothing waits, so that it is looked for.
SAVES_ON_GO = SAVES.replace(
    "def leave(*_):", "def leave(*_):\n    while not (here / 'go').exists(): time.sleep(0.01)"
)
IGNORES = CAN_SAVE + "signal.signal(signal.SIGTERM, lambda *_: events.write('phase', name='ignored'))\n"
WAITS = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
(here / f"pid{rank}").write_text(str(os.getpid()))
(here / f"pidchild{rank}").write_text(str(child.pid))
events.write("ready")
while True: signal.pause()
"""


class FakeJob:
    """Runs a fake rank script under the supervisor and collects its events."""

    def __init__(self, tmp_path: Path) -> None:
        self.dir = tmp_path
        self.folder = create_next(tmp_path / "runs", "fake", "00000000")
        self.events: list[dict] = []

    @property
    def env(self) -> dict[str, str]:
        return {"FAKE_DIR": str(self.dir), "PYTHONPATH": str(REPOSITORY)}

    def run(self, script: str, world_size: int = 1, **options):
        options.setdefault("patience", Patience(report_s=0.5, teardown_s=0.5))
        options["env"] = self.env | options.get("env", {})
        return run(
            [sys.executable, "-c", PRELUDE + script],
            self.folder,
            world_size,
            on_event=self.events.append,
            **options,
        )

    def pids(self, pattern: str = "pid*") -> list[int]:
        return [int(path.read_text()) for path in self.dir.glob(pattern)]


def await_death(pids: Sequence[int], seconds: float = 10.0) -> None:
    """Wait on pidfds, no polling."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], (
                    f"{pid} still lives"
                )
            finally:
                os.close(fd)


def await_taken(pid: int, number: signal.Signals) -> None:
    """Until a process has a signal no more among those that wait for it: equal ones wait as one."""
    deadline = time.monotonic() + 5.0
    pending = re.compile(r"^(?:Sig|Shd)Pnd:\s*([0-9a-f]+)$", re.MULTILINE)
    while any(
        int(mask, 16) >> (number - 1) & 1 for mask in pending.findall(Path(f"/proc/{pid}/status").read_text())
    ):
        assert time.monotonic() < deadline
