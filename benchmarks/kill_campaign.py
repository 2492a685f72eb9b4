"""Runs that are killed with -9 again and again, and in the end are the run that nobody disturbed.

    python benchmarks/kill_campaign.py --kills 50 --ranks 1,2,4 --json benchmarks/results/kills.json

A run is started, killed at a random moment, started again by the same command, killed again, and left to
finish after a few times. Runs save beside training and while training waits, in turns. After every kill its
processes must be gone, its lock free, its folder in order; after every start it must go on from the last save
that was completed; at the end its figures must be those of the undisturbed run. What fails says its seed and
keeps its folder. ``--only N`` repeats one run. A thousand kills take hours, which need not be in one piece:

    python benchmarks/kill_campaign.py --kills 1000 --at-once 2 --ranks 1,2,1,4,1,1,2,1 --seed 7 --record FILE

goes on after the runs that are recorded there, such as those of ``benchmarks/results/kills_1000.jsonl``.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.campaigns import Command, counted, small_job
from benchmarks.kills import Life, Strike
from benchmarks.run_figures import (
    Figures,
    being_saved,
    leftovers,
    lock_is_free,
    newest_whole,
    tracked,
)
from benchmarks.sittings import Asked, from_command_line
from megaplug.runs.checkpoints import SAVING, list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.state import read_state

ITERS = 30
TOLERANCE = 1e-6
# So long after a kill no process of the run may live: a rank's death lets the others say why they fail, too.
GONE_S = 20.0
# A process that was never seen may end unseen: it still has files for a moment.
FREE_S = 1.0
MOST_KILLS_A_RUN = 12


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody kills: how long it takes and what it records."""

    life: Life
    figures: Figures


@dataclass(frozen=True)
class Kill:
    """What one kill has found and left.

    Attributes:
        aim: What it was aimed at.
        victim: Who was killed.
        found: What its folder was in the middle of.
        gone_s: Seconds until no process was left.
        saved: The last save that was seen to be completed before it, as a step.
        whole: The newest whole checkpoint after it.
    """

    aim: str
    victim: str
    found: str
    gone_s: float
    saved: int
    whole: int


@dataclass
class Run:
    """One run of the campaign, from its first start to its end.

    Attributes:
        number: In the campaign.
        world_size: Its ranks.
        async_save: Whether it trains on while it saves.
        kills: What has hit it.
        starts: How often its command was typed.
        difference: The largest from the undisturbed run's figures.
        failure: Why it counts as failed; empty where it does not.
    """

    number: int
    world_size: int
    async_save: bool
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    difference: float = 0.0
    failure: str = ""

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Run:
        """As it was recorded."""
        return cls(**{**fields, "kills": [Kill(**kill) for kill in fields["kills"]]})


def undisturbed(place: Path, world_size: int) -> Undisturbed:
    """Make it and measure it."""
    command = Command(small_job(place, world_size, ITERS), place / f"undisturbed{world_size}")
    try:
        command.wait_for(lambda: bool(command.of("step")))
        start_s = time.monotonic() - command.began
        if command.end() != 0:
            raise RuntimeError(f"the undisturbed run has failed: {command.errors[-2000:]}")
    finally:
        command.close()
    folder = command.folder()
    assert folder is not None
    writing = [event["seconds"] for event in command.of("saved")]
    training_s = command.events[-1]["heard"] - command.began - start_s
    return Undisturbed(Life(start_s, training_s, max(writing)), Figures.of(folder))


def kill_and_restart(
    place: Path, run: Run, wanted: Undisturbed, chance: random.Random, is_enough: Callable[[], bool]
) -> None:
    """One run from its first start to its end, killed a few times unless that is enough for the campaign.

    Raises:
        AssertionError: Something does not hold.
        TimeoutError: Processes that do not end.
    """
    runs_dir = place / f"run{run.number}"
    words = [*small_job(place, run.world_size, ITERS), f"checkpoint.async_save={str(run.async_save).lower()}"]
    wishes, whole = chance.randint(3, MOST_KILLS_A_RUN), 0
    while True:
        run.starts += 1
        command = Command(words, runs_dir)
        try:
            landed = None
            if len(run.kills) < wishes and not is_enough():
                strike = Strike.draw(chance, wanted.life, whole, ITERS, run.world_size)
                landed = strike if strike.land(command) else None
            if landed is None:
                code = command.end()
                assert code == 0, f"the command has ended with {code}: {command.errors[-2000:]}"
                command.await_nobody(GONE_S)
                went_on_from(command, whole)
                break
            kill = after(command, landed, whole)
        finally:
            command.close()
        run.kills.append(kill)
        went_on_from(command, whole)
        whole = kill.whole
    run.difference = finished(runs_dir, wanted)


def after(command: Command, strike: Strike, whole: int) -> Kill:
    """What a kill has left: nobody, a free lock, a state, whole checkpoints, none of which was lost."""
    gone_s = command.await_nobody(GONE_S)
    command.end(30.0)
    folder = command.folder()
    if folder is None:
        return Kill(strike.aim, strike.victim, "no folder yet", gone_s, 0, 0)
    # Heard from the ranks through the launcher's own words; what nobody has heard of need not be there.
    saved = max([whole, *(event["iteration"] for event in command.of("saved"))])
    assert lock_is_free(folder, FREE_S), "the lock is held by nobody"
    state = read_state(folder.state_file)
    assert state is None or state.saved_iteration <= newest_whole(folder), f"{state} promises too much"
    found = newest_whole(folder)
    assert found >= saved, f"the save of step {saved} was completed, and {found} is the newest"
    assert tracked(folder) in {0, *(one.iteration for one in list_checkpoints(folder.checkpoints))}
    if strike.victim == "a rank" and command.of("summary"):
        assert state is not None, "no state after the death of a rank"
        summary = command.of("summary")[-1]
        assert state.status == summary["status"] in ("failed", "finished"), (state, summary)
    return Kill(strike.aim, strike.victim, _in_the_middle_of(command, folder), gone_s, saved, found)


def _in_the_middle_of(command: Command, folder: RunFolder) -> str:
    """What the folder shows of the moment of the kill, or else what was heard before it."""
    place = folder.checkpoints / SAVING
    if place.is_dir() and any(entry.name.startswith("old_") for entry in place.iterdir()):
        return "removing an old checkpoint"
    if being_saved(folder):
        return "saving"
    if newest_whole(folder) > tracked(folder):
        return "between name and tracker"
    state = read_state(folder.state_file)
    if state is not None and state.status == "finished":
        return "finished"
    return "training" if command.of("step") else "starting"


def went_on_from(command: Command, whole: int) -> None:
    """It said from where, and that was the newest whole checkpoint; so was its first step."""
    for header in command.of("header"):
        said = header.get("resumes")
        assert said == (f"from step {whole:,}" if whole else None), f"resumes {said}, not from {whole}"
    steps = [event["iteration"] for event in command.of("step")]
    assert not steps or steps == list(range(whole + 1, whole + 1 + len(steps))), (
        f"steps {steps} after {whole}"
    )


def finished(runs_dir: Path, wanted: Undisturbed) -> float:
    """The run has ended, and its record is that of the undisturbed one: the largest difference."""
    (path,) = runs_dir.iterdir()
    folder = RunFolder(path)
    state = read_state(folder.state_file)
    assert state is not None and state.status == "finished", state
    assert state.iteration == state.saved_iteration == newest_whole(folder) == tracked(folder) == ITERS, state
    assert folder.loss_curve.read_bytes().startswith(b"\x89PNG"), "no loss curve"
    assert not (left := leftovers(folder)), f"left over: {left}"
    difference = Figures.of(folder).difference(wanted.figures)
    assert difference <= TOLERANCE, f"figures differ by {difference}"
    return difference


def campaign(asked: Asked, before: Sequence[Run] = ()) -> list[Run]:
    """Runs until so many kills have landed or the time is up; the failed ones keep their folders."""
    runs, place, sizes = list(before), asked.place, asked.world_sizes
    known: dict[int, Undisturbed] = {}
    for size in dict.fromkeys(sizes if asked.only is None else [sizes[asked.only % len(sizes)]]):
        known[size] = undisturbed(place, size)
        print(f"{size} ranks, undisturbed: {known[size].life}", flush=True)
    end = time.monotonic() + asked.seconds

    def is_enough() -> bool:
        return sum(len(run.kills) for run in runs) >= asked.number or time.monotonic() > end

    def one(number: int) -> Run:
        turn, place_in_turn = divmod(number, len(sizes))
        run = Run(number, sizes[place_in_turn], async_save=turn % 2 == 0)
        runs.append(run)
        began = time.monotonic()
        try:
            chance = random.Random(f"{asked.seed} {number}")
            kill_and_restart(place, run, known[run.world_size], chance, is_enough)
            shutil.rmtree(place / f"run{number}")
        except (AssertionError, OSError, ValueError, subprocess.SubprocessError):
            run.failure = traceback.format_exc(limit=-2)
            print(f"FAILED: --seed {asked.seed} --only {number}, see {place / f'run{number}'}\n{run.failure}")
        told = ", ".join(f"{kill.victim} while {kill.found} (aim {kill.aim})" for kill in run.kills)
        total = sum(len(run.kills) for run in runs)
        print(
            f"run {number}: {run.world_size} ranks, {'saves beside training, ' if run.async_save else ''}"
            f"{run.starts} starts, {time.monotonic() - began:.0f} s, "
            f"differs by {run.difference:g}; {total} of {asked.number} kills: {told}",
            flush=True,
        )
        return run

    asked.go_through(one, is_enough)
    return runs


def report(runs: list[Run]) -> dict[str, Any]:
    """What is written: the campaign's sums, and every failure in full."""
    kills = [kill for run in runs for kill in run.kills]
    gone = sorted(kill.gone_s for kill in kills)
    return {
        "what": "runs that were killed with SIGKILL and started again until they were finished; measured",
        "kills": len(kills),
        "runs": len(runs),
        "starts": sum(run.starts for run in runs),
        "failures": [asdict(run) for run in runs if run.failure],
        "largest_difference_of_any_figure": max(run.difference for run in runs),
        "kills_by_ranks": counted(str(run.world_size) for run in runs for _ in run.kills),
        "kills_by_saving": counted(
            "beside training" if run.async_save else "while training waits" for run in runs for _ in run.kills
        ),
        "kills_by_victim": counted(kill.victim for kill in kills),
        "kills_by_what_they_hit": counted(kill.found for kill in kills),
        "saves_lost_that_were_completed": sum(kill.whole < kill.saved for kill in kills),
        "seconds_until_no_process_was_left": {
            "median": round(gone[len(gone) // 2], 2),
            "largest": round(gone[-1], 2),
            "allowed": GONE_S,
        },
    }


if __name__ == "__main__":
    sys.exit(from_command_line("kills", 50, "1,2,4", Run, campaign, report, __doc__))
