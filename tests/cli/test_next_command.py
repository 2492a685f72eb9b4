"""What a summary says can be typed next."""

from __future__ import annotations

from pathlib import Path

from megaplug.commands.cli import parse
from megaplug.commands.run import _next_command
from megaplug.launchers.verdict import Outcome
from megaplug.runs.early_stop import Plateau
from megaplug.runs.folder import RunFolder


def following(outcome: Outcome, *words: str) -> str:
    return _next_command(outcome, RunFolder(Path("runs/x")), parse(words, "train"), 90)


def test_a_run_that_ended_early_can_go_on_to_its_last_step():
    outcome = Outcome("finished", 48, 48, Plateau(2.5, 32, 2, 48).reason(0.3))
    words = ("train.iters=90", "train.early_stop_patience=2", "resume=false")
    assert following(outcome, *words) == "train train.iters=90 train.early_stop_patience=null   # goes on"
    at_the_end = Outcome("finished", 90, 90, outcome.reason)
    assert "goes on" not in following(at_the_end, *words)
    assert "load=runs/x" in following(Outcome("finished", 90, 90), *words)
