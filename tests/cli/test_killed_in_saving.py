"""Ranks that die at a chosen operation of a save; the same command then goes on as if nothing had been.

`benchmarks/kill_campaign.py` kills at random moments; what it checks is checked here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import kill_campaign
from benchmarks.campaigns import ROOT, Command, small_job
from benchmarks.kill_campaign import after, finished, undisturbed, went_on_from
from benchmarks.kills import Strike

pytestmark = pytest.mark.slow

ITERS = 12
# A rank kills itself when it is about to do something to a file; sitecustomize comes before everything.
HOOK = """
import os, signal, sys
if os.environ.get("RANK") == "{rank}":
    left = {spared}
    def hear(event, args):
        global left
        if event == "{operation}" and "{path}" in str(args[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hear)
"""


@dataclass(frozen=True)
class Stage:
    """A moment of a run's life.

    Attributes:
        operation: What is about to be done, as Python's audit hooks are told it.
        path: A part of the name of what it is done to.
        found: What the folder then is in the middle of.
        spared: How often it may be done before.
        last: Whether the last rank is to die and not the first.
    """

    operation: str
    path: str
    found: str = "saving"
    spared: int = 1
    last: bool = False


SHARD = Stage("open", ".distcp")
LAST_SHARD = Stage("open", ".distcp", last=True)
LIST_OF_SHARDS = Stage("os.rename", "/.metadata.tmp")
MANIFEST = Stage("os.rename", "/.manifest.json.")
TRACKER = Stage("os.rename", "/.latest_checkpointed", found="between name and tracker")
OLD_ONE = Stage("shutil.rmtree", "/saving/old_iter_", found="removing an old checkpoint", spared=0)
METRICS = Stage("open", "/metrics.jsonl", found="training", spared=5, last=True)
TURNS = {1: [SHARD, MANIFEST, OLD_ONE, METRICS], 2: [LAST_SHARD, TRACKER, LIST_OF_SHARDS]}


def dying(stage: Stage, world_size: int, site: Path) -> dict[str, str]:
    """The environment in which a rank dies there."""
    site.mkdir()
    rank = world_size - 1 if stage.last else 0
    hook = HOOK.format(rank=rank, spared=stage.spared, operation=stage.operation, path=stage.path)
    (site / "sitecustomize.py").write_text(hook)
    return {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


@pytest.mark.parametrize(
    "world_size", [1, pytest.param(2, marks=pytest.mark.soak)], ids=lambda number: f"ranks{number}"
)
def test_a_rank_that_dies_at_any_operation_of_a_save_costs_no_completed_save(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill_campaign, "ITERS", ITERS)
    wanted = undisturbed(tmp_path, world_size)
    words, runs_dir, whole = small_job(tmp_path, world_size, ITERS), tmp_path / "runs", 0
    for number, stage in enumerate(TURNS[world_size]):
        command = Command(words, runs_dir, dying(stage, world_size, tmp_path / f"site{number}"))
        try:
            assert command.end() == 1, command.errors
            kill = after(command, Strike(str(stage), None, 0.0, 0.0, "a rank", 0), whole)
            went_on_from(command, whole)
        finally:
            command.close()
        assert kill.found == stage.found, stage
        assert "killed" in command.of("summary")[-1]["reason"]
        whole = kill.whole
    command = Command(words, runs_dir)
    try:
        assert command.end() == 0, command.errors
        went_on_from(command, whole)
    finally:
        command.close()
    assert whole > 0
    assert finished(runs_dir, wanted) == 0.0
