"""How a campaign is asked for, runs at once and side by side, and goes on in another sitting.

With ``--record FILE`` every run that has ended is a line of that file. The same command given again goes on
after them, and what it reports is the sum of all sittings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import environment  # noqa: E402
from megaplug.job.freeze import code_revision  # noqa: E402
from megaplug.runs.atomic import write_json_atomic  # noqa: E402


class Run(Protocol):
    """One run of a campaign: a dataclass that can be made of its own fields again."""

    number: int

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Any:
        """That run, given what ``dataclasses.asdict`` makes of it."""
        ...


class Record:
    """The runs that have ended, in a file that each is added to.

    Args:
        path: The file, which need not be there; None keeps nothing.
        seed: Of the campaign.

    Raises:
        ValueError: The file has runs of another seed, or is no such record.
    """

    def __init__(self, path: Path | None, seed: int) -> None:
        self._path = path
        self._began = time.time()
        self._seed = seed
        self._lock = threading.Lock()
        self.lines: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        content = path.read_bytes()
        # A sitting that was killed in writing has left a line without an end.
        whole = content[: content.rfind(b"\n") + 1]
        try:
            self.lines += [json.loads(line) for line in whole.splitlines()]
            seeds = {line["seed"] for line in self.lines}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record of a campaign") from error
        if seeds - {seed}:
            raise ValueError(f"{path} has runs of --seed {seeds.pop()}")
        os.truncate(path, len(whole))

    def add(self, run: Any) -> None:
        """That run has ended, whatever became of it."""
        line = {
            "seed": self._seed,
            "sitting": round(self._began),
            "after_s": round(time.time() - self._began),
            "revision": code_revision(),
            "run": asdict(run),
        }
        with self._lock:
            self.lines.append(line)
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def sums(self) -> dict[str, Any]:
        """Of all sittings: how long they took, and of which revisions of the code they were."""
        lasted: dict[int, int] = {}
        for line in self.lines:
            lasted[line["sitting"]] = max(line["after_s"], lasted.get(line["sitting"], 0))
        revisions = sorted({line["revision"] for line in self.lines})
        return {"sittings": len(lasted), "seconds": sum(lasted.values()), "revisions": revisions}


@dataclass(frozen=True)
class Asked:
    """What is asked of a campaign.

    Attributes:
        place: A folder for its runs.
        number: How many disturbances have to come, those of earlier sittings among them.
        world_sizes: Numbers of ranks, in turns.
        seed: What moments are drawn with.
        seconds: After them only what is begun is finished.
        only: The number of the only run, or None.
        at_once: How many runs are under way at a time.
        record: Of this sitting and those before.
    """

    place: Path
    number: int
    world_sizes: list[int]
    seed: int = 1
    seconds: float = 36_000.0
    only: int | None = None
    at_once: int = 1
    record: Record = field(default_factory=lambda: Record(None, 1))

    def go_through(self, one: Callable[[int], Run], is_enough: Callable[[], bool]) -> None:
        """Call ``one`` with the next number until it is enough, or with that of the only run.

        Args:
            one: A run of the campaign, given its number; it is recorded. What it raises ends the campaign.
            is_enough: Asked before each.

        Ctrl-C waits for the runs that are under way side by side.
        """
        if self.only is not None:
            one(self.only)
            return
        first = max((line["run"]["number"] + 1 for line in self.record.lines), default=0)
        numbers, turn, is_over = itertools.count(first), threading.Lock(), threading.Event()

        def work() -> None:
            while True:
                with turn:
                    if is_over.is_set() or is_enough():
                        return
                    number = next(numbers)
                self.record.add(one(number))

        if self.at_once == 1:
            work()
            return
        with ThreadPoolExecutor(self.at_once) as pool:
            workers = [pool.submit(work) for _ in range(self.at_once)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                is_over.set()


def from_command_line[R: Run](
    what: str,
    number: int,
    ranks: str,
    kind: type[R],
    campaign: Callable[[Asked, list[R]], list[R]],
    report: Callable[[list[R]], dict[str, Any]],
    description: str | None,
) -> int:
    """Run a campaign as its words ask, print what it found, write it.

    Args:
        what: What disturbs the runs; ``--<what>`` says how many.
        number: Of them, if nothing is said.
        ranks: Numbers of ranks, likewise, separated by commas.
        kind: The class of its runs.
        campaign: Given what is asked and the runs of earlier sittings, these and its own.
        report: Given the runs; ``failures`` names those that failed.
        description: For ``--help``.

    Returns:
        The exit code: 1 if anything has failed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(f"--{what}", type=int, default=number, dest="number", help="how many have to come")
    parser.add_argument("--minutes", type=float, default=600.0, help="after that, only finish what is begun")
    parser.add_argument("--ranks", default=ranks, help="numbers of ranks, in turns")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one run of the campaign, by its number")
    parser.add_argument("--at-once", type=int, default=1, help="runs that go on side by side")
    parser.add_argument("--folder", type=Path, help="where each sitting makes its own, for failed runs")
    parser.add_argument("--record", type=Path, help="keeps ended runs; given again, go on after them")
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    try:
        record = Record(words.record, words.seed)
    except ValueError as error:
        parser.error(f"--record: {error}")
    if words.folder:
        words.folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"{what}-", dir=words.folder))
    asked = Asked(
        place=place,
        number=words.number,
        world_sizes=[int(word) for word in words.ranks.split(",")],
        seed=words.seed,
        seconds=words.minutes * 60,
        only=words.only,
        at_once=words.at_once,
        record=record,
    )
    before = [kind.of_fields(line["run"]) for line in record.lines]
    runs = campaign(asked, before)
    found = {**report(runs), "seed": asked.seed, **record.sums()}
    print(json.dumps(found, indent=2))
    if words.json:
        write_json_atomic(words.json, {**found, "machine": environment("cpu")})
    if not found["failures"]:
        shutil.rmtree(place)
    return 1 if found["failures"] else 0
