"""Fake ranks: little programs that speak the event protocol, in place of Megatron."""

from __future__ import annotations

import sys
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
