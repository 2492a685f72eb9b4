"""Runs that are stopped by signals at random moments, and in the end are the run that nobody disturbed.

    python benchmarks/signal_campaign.py --signals 60 --ranks 1,2 --json benchmarks/results/signals.json

SIGTERM, SIGINT and SIGUSR2 come in turns at moments drawn from the whole life of a run, every third of them
twice in a row; a second Ctrl-C must end everything at once, any other must change nothing. After each one the
command must have ended in time with the code of the signal, its processes must be gone, its lock free, its
state right and its checkpoint whole; after a few the run is left to finish, and its figures must be those of
the undisturbed one. What fails says its seed and keeps its folder. ``--only N`` repeats one run.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.campaigns import Command, counted, small_job
from benchmarks.run_figures import Figures, being_saved, leftovers, lock_is_free, newest_whole, tracked
from benchmarks.sittings import Asked, from_command_line
from megaplug.runs.state import RunState, read_state

ITERS, VALIDATED_EVERY = 120, 24
TOLERANCE = 1e-6
GRACE_S = 60.0  # the stated time
AT_ONCE_S = 4.0  # 0.1 s were seen, and 2.5 s on a crowded machine
# For the launcher to tidy up and to draw the curve, on a machine that does other things, too.
END_S = 10.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
A_RUN = 4
# Shares of all moments: in the time before the first step, and in the second after the last.
STARTING, ENDING = 0.4, 0.1


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody stops: seconds to its first step, and what it records."""

    start_s: float
    figures: Figures


@dataclass(frozen=True)
class Blow:
    """One signal, or two, and what became of the run.

    Attributes:
        name: Of the signal.
        after_s: So long after the command's start.
        again_s: So long after the first came a second; None for one alone.
        found: What the run was doing.
        code: The command's exit code.
        ended_s: Seconds from the last signal to its end.
        reason: As its state says.
        whole: The newest whole checkpoint after it.
    """

    name: str
    after_s: float
    again_s: float | None
    found: str
    code: int
    ended_s: float
    reason: str
    whole: int


@dataclass
class Run:
    """One run of the campaign, with the signals that it got."""

    number: int
    world_size: int
    blows: list[Blow] = field(default_factory=list)
    starts: int = 0
    difference: float = 0.0
    failure: str = ""

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Run:
        """As it was recorded."""
        return cls(**{**fields, "blows": [Blow(**blow) for blow in fields["blows"]]})


def words_of(place: Path, world_size: int) -> list[str]:
    """The job, with validations that last."""
    words = [word for word in small_job(place, world_size, ITERS, 10) if not word.startswith("train.eval_")]
    return [
        *words,
        "train.eval_iters=40",
        f"train.eval_interval={VALIDATED_EVERY}",
        f"launch.grace_s={GRACE_S}",
    ]


def undisturbed(place: Path, world_size: int) -> Undisturbed:
    """Make it and measure it."""
    command = Command(words_of(place, world_size), place / f"undisturbed{world_size}")
    try:
        command.wait_for(lambda: bool(command.of("step")))
        start_s = time.monotonic() - command.began
        if command.end() != 0:
            raise RuntimeError(f"the undisturbed run has failed: {command.errors[-2000:]}")
    finally:
        command.close()
    folder = command.folder()
    assert folder is not None
    return Undisturbed(start_s, Figures.of(folder))


@dataclass(frozen=True)
class Moment:
    """When a signal comes.

    Attributes:
        step: As soon as it is heard of; 0 for the command's start.
        delay_s: After that.
        again_s: After the first signal comes the second; None for one alone.
    """

    step: int
    delay_s: float
    again_s: float | None

    @classmethod
    def draw(cls, chance: random.Random, start_s: float, whole: int) -> Moment:
        """Any in the life of a run that goes on from a step."""
        at, again_s = chance.random(), chance.uniform(0.0, 0.6) if chance.random() < 1 / 3 else None
        if at < STARTING or whole == ITERS:
            return cls(0, chance.uniform(0.0, start_s), again_s)
        if at > 1 - ENDING:
            return cls(ITERS, chance.uniform(0.0, 1.5), again_s)
        # Some steps are followed by a validation, or a save, which the delay may reach.
        return cls(chance.randint(whole + 1, ITERS), chance.uniform(0.0, 0.3), again_s)

    def come(self, command: Command) -> bool:
        """Wait for it; False if the command has ended before."""

        def reached() -> bool:
            steps = command.of("step")[-1:]
            return not self.step or (bool(steps) and steps[0]["iteration"] >= self.step)

        if not command.wait_for(reached):
            return False
        began = time.monotonic() if self.step else command.began
        return command.wait_for(lambda: time.monotonic() - began >= self.delay_s)


def strike(command: Command, name: str, moment: Moment) -> Blow | None:
    """Send it and wait for the end; None where the run had ended before.

    Raises:
        AssertionError: It did not end as it must.
    """
    number, again_s = signal.Signals[name], moment.again_s
    if not moment.come(command):
        return None
    after_s = time.monotonic() - command.began
    found = doing(command)
    command.process.send_signal(number)
    sent = time.monotonic()
    if again_s is not None:
        command.wait_for(lambda: time.monotonic() - sent >= again_s)
        if command.process.poll() is None:
            command.process.send_signal(number)
            sent = time.monotonic()
    code = command.end(GRACE_S + END_S)
    ended_s = time.monotonic() - sent
    command.await_nobody(AT_ONCE_S)
    if found == "importing" and code == -number:
        code = 128 + number  # Python itself was not up yet: what a shell makes of it
    assert code in (0, 128 + number), f"exit code {code}: {command.errors[-2000:]}"
    assert "Traceback" not in command.errors, command.errors
    reason, whole = judged(command, name, code)
    if again_s is not None and number == signal.SIGINT:
        assert ended_s <= AT_ONCE_S, f"{ended_s:.1f} s after a second Ctrl-C"
    again_s = again_s if again_s is None else round(again_s, 3)
    return Blow(name, round(after_s, 2), again_s, found, code, round(ended_s, 2), reason, whole)


def doing(command: Command) -> str:
    """What a run is doing, by what it has said and by its folder."""
    folder = command.folder()
    if folder is not None and being_saved(folder):
        return "saving"
    if not command.of("header"):
        return "checking and preparing" if command.began + 1.0 < time.monotonic() else "importing"
    if command.of("summary"):
        return "the end"
    if not command.of("step"):
        phases = [event["name"] for event in command.of("phase")]
        return "first step" if phases[-1:] == ["training"] else "starting"
    told = [event for event in command.events if event["event"] in ("step", "valid", "phase")]
    last = told[-1]
    if last["event"] == "phase":
        return str(last["name"])
    return "the end" if last["iteration"] == ITERS else "training"


def judged(command: Command, name: str, code: int) -> tuple[str, int]:
    """What the state says of the end, and the newest checkpoint; both must fit each other.

    Raises:
        AssertionError: They do not.
    """
    folder = command.folder()
    if folder is None:
        assert code != 0
        return "before there was a folder", 0
    assert lock_is_free(folder, AT_ONCE_S), "the lock is held by nobody"
    whole, state = newest_whole(folder), read_state(folder.state_file)
    started = bool(command.of("phase") or command.of("summary"))
    if not started and (state is None or state.signal != name):
        assert state is None or state.status != "running", state
        return "before its ranks were started", whole
    assert state is not None
    assert state.saved_iteration == whole, f"{state}, and {whole} is the newest"
    assert tracked(folder) == whole
    if code == 0 or state.status == "finished":
        # The last that a command does is to sum up and to draw: a signal cuts that short.
        assert (state.status, state.iteration, whole) == ("finished", ITERS, ITERS), state
        return "finished" if code == 0 else f"finished, before {name}", whole
    assert (state.status, state.signal) == ("stopped", name), state
    if state.reason.startswith("saved after"):
        assert state.iteration == whole, state
        assert not being_saved(folder), "something is left half saved"
        _recorded_up_to(command, state)
    return state.reason, whole


def _recorded_up_to(command: Command, state: RunState) -> None:
    folder = command.folder()
    assert folder is not None
    steps = [key[0] for key, _ in Figures.of(folder).lines if key[1] is None]
    assert steps == list(range(1, state.iteration + 1)), f"steps {steps} at {state}"


def stop_and_go_on(
    place: Path, run: Run, wanted: Undisturbed, names: list[str], chance: random.Random
) -> None:
    """One run from its first start to its end, stopped by these signals.

    Raises:
        AssertionError: Something does not hold.
        TimeoutError: Something does not end.
    """
    words, runs_dir, whole, left = words_of(place, run.world_size), place / f"run{run.number}", 0, list(names)
    while True:
        run.starts += 1
        command = Command(words, runs_dir)
        blow = None
        try:
            if left:
                moment = Moment.draw(chance, wanted.start_s, whole)
                blow = strike(command, left[0], moment)
            if blow is None:
                assert command.end() == 0, command.errors[-2000:]
                command.await_nobody(END_S)
        finally:
            command.close()
        for header in command.of("header"):
            assert header.get("resumes") == (f"from step {whole:,}" if whole else None), (header, whole)
        if blow is not None:
            left.pop(0)
            run.blows.append(blow)
            assert blow.whole >= whole, f"{blow} has lost step {whole}"
            whole = blow.whole
        if blow is None or blow.code == 0:
            break
    folder = command.folder()
    assert folder is not None
    state = read_state(folder.state_file)
    assert state is not None and (state.status, state.saved_iteration) == ("finished", ITERS), state
    assert not (more := leftovers(folder)), f"left over: {more}"
    run.difference = Figures.of(folder).difference(wanted.figures)
    assert run.difference <= TOLERANCE, f"figures differ by {run.difference}"


def campaign(asked: Asked, before: Sequence[Run] = ()) -> list[Run]:
    """Runs until so many signals have come or the time is up; the failed ones keep their folders."""
    place, sizes = asked.place, asked.world_sizes
    known = {size: undisturbed(place, size) for size in sizes}
    for size, one_run in known.items():
        print(f"{size} ranks: {one_run.start_s:.1f} s to the first step", flush=True)
    runs = list(before)
    end = time.monotonic() + asked.seconds

    def left() -> int:
        return asked.number - sum(len(run.blows) for run in runs)

    def one(number: int) -> Run:
        chance = random.Random(f"{asked.seed} {number}")
        first = number * A_RUN
        names = [SIGNALS[place_ % 3].name for place_ in range(first, first + min(A_RUN, left()))]
        run = Run(number, sizes[number % len(sizes)])
        runs.append(run)
        try:
            stop_and_go_on(place, run, known[run.world_size], names, chance)
            shutil.rmtree(place / f"run{number}")
        except (AssertionError, OSError, ValueError, subprocess.SubprocessError):
            run.failure = traceback.format_exc(limit=-2)
            print(f"FAILED: --seed {asked.seed} --only {number}, see {place / f'run{number}'}\n{run.failure}")
        print(f"run {number}: {run.world_size} ranks, {run.starts} starts, differs by {run.difference:g}")
        for blow in run.blows:
            twice = f" and again after {blow.again_s} s" if blow.again_s is not None else ""
            print(f"  {blow.name}{twice} while {blow.found}: {blow.code} in {blow.ended_s} s, {blow.reason}")
        sys.stdout.flush()
        return run

    asked.go_through(one, lambda: left() <= 0 or time.monotonic() > end)
    return runs


def report(runs: list[Run]) -> dict[str, Any]:
    """What is written: the campaign's sums, and every failure in full."""
    blows = [blow for run in runs for blow in run.blows]
    at_once = [blow.ended_s for blow in blows if "at once" in blow.reason]
    return {
        "what": "runs that got signals at random moments and went on until they were finished; measured",
        "signals": len(blows),
        "by_signal": counted(blow.name for blow in blows),
        "twice_in_a_row": sum(blow.again_s is not None for blow in blows),
        "by_what_they_found": counted(blow.found.partition(";")[0] for blow in blows),
        "by_what_became_of_it": counted(blow.reason.partition(";")[0] for blow in blows),
        "runs": len(runs),
        "runs_by_ranks": counted(str(run.world_size) for run in runs),
        "starts": sum(run.starts for run in runs),
        "failures": [asdict(run) for run in runs if run.failure],
        "largest_difference_of_any_figure": max(run.difference for run in runs),
        "seconds_to_the_end": {
            "stated": GRACE_S,
            "largest": max(blow.ended_s for blow in blows),
            "after_being_killed_at_once": {
                "median": sorted(at_once)[len(at_once) // 2] if at_once else None,
                "largest": max(at_once, default=None),
                "allowed": AT_ONCE_S,
            },
        },
    }


if __name__ == "__main__":
    sys.exit(from_command_line("signals", 60, "1,2", Run, campaign, report, __doc__))
