"""Commands side by side: as many as are asked for, each with devices of its own, and none left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megaplug.launchers import side_by_side
from megaplug.launchers.side_by_side import SideBySide, Work
from megaplug.launchers.stops import StopSignals

ROOT = Path(__file__).resolve().parents[2]


class Beside:
    """Runs little programs in place of training."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.lines: list[tuple[int, str]] = []
        self.codes: dict[int, int] = {}

    def run(
        self,
        *programs: str,
        at_once: int = 2,
        gpus: int = 0,
        num_gpus: int = 0,
        on_line: Callable[[int, str], None] = lambda *_: None,
    ) -> dict[int, int]:
        def said(number: int, line: str) -> None:
            self.lines.append((number, line))
            on_line(number, line)

        works = [Work(number, ("", program), num_gpus) for number, program in enumerate(programs, start=1)]
        beside = SideBySide(at_once, [str(gpu) for gpu in range(gpus)], 3, self.begun.append, said)
        with StopSignals() as signals:
            self.codes = beside.run(works, signals)
        return self.codes


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Beside:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(side_by_side, "_TRAIN", "import os, signal; exec(sys.argv[1])")
    return Beside()


def test_no_more_run_at_a_time_than_are_asked_for(beside):
    os.mkfifo("meet")
    # The first two are through once both have come; the third finds that one of them has gone.
    programs = ("open('meet', 'w').close(); open('gone1', 'w')", "open('meet').close(); open('gone2', 'w')")
    third = "sys.exit(not (os.path.exists('gone1') or os.path.exists('gone2')))"
    assert beside.run(*programs, third) == {1: 0, 2: 0, 3: 0}
    assert beside.begun == [1, 2, 3]


def test_what_each_writes_is_told_with_its_number_to_the_last_word(beside):
    programs = ("print('a'); print('b', end='')", "print('c', file=sys.stderr); sys.exit(7)")
    assert beside.run(*programs) == {1: 0, 2: 7}
    assert sorted(beside.lines) == [(1, "a"), (1, "b"), (2, "c")]


def test_each_has_gpus_of_its_own_and_waits_until_some_are_free(beside):
    show = "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert set(beside.run(*[show] * 4, at_once=4, gpus=5, num_gpus=2).values()) == {0}
    shown = [line for _, line in beside.lines]
    assert all(len(set(line.split(","))) == 2 for line in shown) and len(shown) == 4
    assert {line for number, line in beside.lines if number < 3} == {"0,1", "2,3"}


def test_threads_are_shared_out_unless_the_environment_says_how_many(beside, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    beside.run("print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    beside.run("print(os.environ['OMP_NUM_THREADS'])")
    assert [line for _, line in beside.lines] == ["3", "1"]


def test_a_signal_reaches_all_that_run_and_nothing_is_started_after_it(beside):
    ready: set[int] = set()

    def on_line(number: int, line: str) -> None:
        ready.add(number)
        if ready == {1, 2}:
            os.kill(os.getpid(), signal.SIGTERM)

    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print('ready', flush=True); signal.pause()"
    assert beside.run(wait, wait, wait, on_line=on_line) == {1: 5, 2: 5}
    assert beside.begun == [1, 2]


def test_a_run_that_a_signal_has_ended_has_that_code(beside):
    assert beside.run("os.kill(os.getpid(), signal.SIGKILL)") == {1: 137}


def test_what_fails_here_leaves_nothing_running(beside):
    class Broken(Exception):
        pass

    def on_line(number: int, line: str) -> None:
        raise Broken

    with pytest.raises(Broken):
        beside.run("print(os.getpid(), flush=True); signal.pause()", on_line=on_line)
    ((_, pid),) = beside.lines
    assert not Path(f"/proc/{pid}").exists()


def test_no_run_outlives_a_sweep_that_is_killed(tmp_path):
    script = """
import sys
from megaplug.launchers import side_by_side
from megaplug.launchers.stops import StopSignals
side_by_side._TRAIN = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
beside = side_by_side.SideBySide(1, [], 1, lambda _: None, lambda _, line: print(line, flush=True))
with StopSignals() as signals:
    beside.run([side_by_side.Work(1, ("",))], signals)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as sweep:
        assert sweep.stdout is not None
        process = os.pidfd_open(int(sweep.stdout.readline()))
        sweep.kill()
        assert select.select([process], [], [], 10.0)[0]
        os.close(process)
