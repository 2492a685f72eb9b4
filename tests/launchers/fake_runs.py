"""A command's run of fake ranks: real checkpoints, a lock, and starts that are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_ranks import PRELUDE

from megaplug.commands import attempts
from megaplug.commands.attempts import Attempts, Course
from megaplug.errors import UserError
from megaplug.job.schema import Job
from megaplug.launchers.alerts import Alerts
from megaplug.launchers.nodes import Nodes
from megaplug.launchers.stops import StopSignals
from megaplug.runs import checkpoints, metrics
from megaplug.runs.folder import RunFolder
from megaplug.runs.history import read_events
from megaplug.runs.lock import RunLock

# A rank that trains to step 12, saves every fifth step, and fails as the script says; `turn` counts starts.
TRAINING = (
    PRELUDE
    + """
import json
from megaplug.runs import saving
from megaplug.runs.checkpoints import list_checkpoints
from megaplug.runs.metrics import append_metrics
folder = Path(os.environ["FAKE_RUN"])
mine = here / f"starts{rank}"
turn = len(mine.read_text()) if mine.exists() else 0
mine.write_text("x" * (turn + 1))
with (here / f"ports{rank}").open("a") as file: file.write(os.environ["MASTER_PORT"] + "\\n")
with (here / f"devices{rank}").open("a") as file: file.write(os.environ["LOCAL_RANK"] + "\\n")
print("this is start", turn, flush=True)
kept = [found.iteration for found in list_checkpoints(folder / "checkpoints")]
began = max(kept, default=0)

def fail(kind, **more):
    events.write("end", status="failed", kind=kind, reason=f"{kind} {turn}", **more)
    sys.exit(1)

def save(step):
    place = folder / "checkpoints" / "saving" / f"iter_{step:07d}"
    place.mkdir(parents=True)
    (place / "shard").write_bytes(bytes(100))
    saving.complete(folder / "checkpoints", step)
    events.write("saved", iteration=step, seconds=0.0)

def step(number):
    if rank == 0: append_metrics(folder / "metrics.jsonl", {"iteration": number, "loss": float(turn)})
    events.write("step", iteration=number, iters=12)
    if number % 5 == 0 and rank == 0: save(number)

def train(to):
    for number in range(began + 1, to + 1): step(number)
"""
)
END = """
train(12)
events.write("end", status="finished", iteration=12)
"""


def whole(script: str) -> str:
    """What each rank of a run executes."""
    return TRAINING + script + END


class FakeRun:
    """One command's run of fake ranks.

    Attributes:
        told: What a person was shown.
        when: Is told the same, and may do something to somebody.
    """

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.folder = RunFolder(place / "run")
        self.folder.checkpoints.mkdir(parents=True)
        self.told: list[dict] = []
        self.when: Callable[[dict], None] = lambda event: None
        monkeypatch.setattr(attempts, "make_ready", self._make_ready)
        self.env = {"FAKE_DIR": str(place), "FAKE_RUN": str(self.folder.path)}
        self.env["PYTHONPATH"] = str(Path(attempts.__file__).parents[2])
        monkeypatch.setattr(attempts, "rank_environment", lambda *_: self.env)

    def _make_ready(self, _: object, folder: RunFolder, report: checkpoints.RepairReport) -> None:
        metrics.cut_metrics(folder.metrics_file, report.newest.iteration if report.newest else 0)

    def run(
        self,
        script: str,
        max_restarts: int = 3,
        world_size: int = 1,
        nodes: Nodes | None = None,
        **config,
    ) -> Course:
        job = Job()
        job.watch.max_restarts = max_restarts
        job.launch.grace_s = 5.0
        for key, value in config.items():
            section, name = key.split("__")
            setattr(getattr(job, section), name, value)
        resolved = SimpleNamespace(
            job=job,
            topology=SimpleNamespace(world_size=world_size),
            derived=SimpleNamespace(iters=12),
            source=None,
        )
        command = [sys.executable, "-c", whole(script)]
        alerts = Alerts(job.alerts.command, None, job.alerts.events, 10.0)
        with alerts, RunLock.acquire(self.folder, "typed") as lock, StopSignals() as signals:
            one = Attempts(resolved, self.folder, command, lock, alerts, self._tell, nodes)  # type: ignore[arg-type]
            course = one.run(0, signals)
            self.told += [{"event": "fault", "text": text} for text in alerts.finish(signals.reader)]
        return course

    def _tell(self, event: dict) -> None:
        self.told.append(event)
        self.when(event)
        if event["event"] == "restart":
            with pytest.raises(UserError, match="another job"):
                RunLock.acquire(self.folder)

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.told if event["event"] == kind]

    def starts(self, rank: int = 0) -> int:
        return len((self.place / f"starts{rank}").read_text())

    def history(self) -> list[str]:
        return [event["event"] for event in read_events(self.folder.events_file)]
