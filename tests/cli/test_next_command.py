"""What a summary says can be typed next."""

from __future__ import annotations

from pathlib import Path

from megaplug.commands.cli import parse
from megaplug.commands.next_command import next_command
from megaplug.launchers.verdict import Outcome
from megaplug.runs.early_stop import Plateau
from megaplug.runs.folder import RunFolder


def following(outcome: Outcome, *words: str) -> str:
    return next_command(outcome, RunFolder(Path("runs/x")), parse(words, "train"), 90)


def test_a_run_that_ended_early_can_go_on_to_its_last_step():
    outcome = Outcome("finished", 48, 48, Plateau(2.5, 32, 2, 48).reason(0.3))
    words = ("train.iters=90", "train.early_stop_patience=2", "resume=false")
    assert following(outcome, *words) == "train train.iters=90 train.early_stop_patience=null   # goes on"
    at_the_end = Outcome("finished", 90, 90, outcome.reason)
    assert "goes on" not in following(at_the_end, *words)
    assert "load=runs/x" in following(Outcome("finished", 90, 90), *words)


def test_what_would_come_again_is_not_offered_alone():
    nan = Outcome("failed", 6, 0, "rank 0 failed: NaN in the loss at step 7", rank=0, kind="nan")
    halved = "train lr.lr=0.001   # half the learning rate; starts again: nothing was saved"
    run, typed = RunFolder(Path("runs/x")), parse(["train.iters=90"], "train")
    assert next_command(nan, run, typed, 90, comes_again=True, changed=halved) == halved
    chance = next_command(nan, run, typed, 90, changed=halved)
    assert chance == "train train.iters=90   # starts again: nothing was saved"
    full = Outcome("failed", 41, 20, "rank 0 failed: no space left on /disk", rank=0, kind="disk")
    assert next_command(full, run, typed, 90, comes_again=True) == (
        "train train.iters=90   # once the disk takes it: goes on from step 20"
    )
    error = Outcome("failed", 41, 20, "rank 0 failed: ValueError: x", rank=0, kind="error")
    assert "# once that is mended: goes on" in next_command(error, run, typed, 90, comes_again=True)
