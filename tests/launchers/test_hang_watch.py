"""When a rank counts as hanging, on a clock of the test's own."""

from __future__ import annotations

import pytest

from megaplug.launchers.culprit import judge_hang
from megaplug.launchers.hang import HangWatch, Limits
from megaplug.launchers.lag import LagWatch
from megaplug.launchers.stacks import Stand


class Watched:
    """Two ranks and a clock that goes in ticks."""

    def __init__(self, **limits: float) -> None:
        self.now = 100.0
        self.watch = HangWatch(Limits(**limits), 2, self.now)
        self.count = 0

    def beat(self, phase: str, iteration: int = 0, ranks: tuple[int, ...] = (0, 1)) -> None:
        self.count += 1
        for rank in ranks:
            beat = {"event": "beat", "phase": phase, "iteration": iteration, "progress": self.count}
            self.watch.take(rank, beat)

    def wait(self, seconds: int) -> list[int]:
        for _ in range(seconds):
            self.now += 1.0
            self.watch.tick(self.now)
        return self.watch.overdue((0, 1))


@pytest.mark.parametrize(
    ("phase", "limit"),
    [
        ("starting", 20),
        ("building the model", 20),
        ("loading the checkpoint", 20),
        ("loading data", 20),
        ("first step", 30),
        ("training", 10),
        ("saving", 40),
        ("ending", 40),
    ],
)
def test_each_phase_has_its_limit(phase, limit):
    watched = Watched(start_s=20, first_step_s=30, save_s=40, hang_s=10)
    watched.wait(7)
    watched.beat(phase)
    assert watched.wait(limit) == []
    assert watched.wait(1) == [0, 1]


def test_a_beat_without_progress_is_none():
    watched = Watched(hang_s=10)
    watched.beat("training", 3)
    watched.wait(8)
    watched.count -= 1
    watched.beat("training", 3)
    assert watched.wait(3) == [0, 1]
    watched.beat("training", 3, ranks=(1,))
    assert watched.wait(1) == [0]


def test_a_limit_that_nobody_typed_grows_with_the_steps():
    watched = Watched()
    watched.beat("first step")
    watched.wait(900)  # compilation says nothing of the steps
    watched.beat("training", 1)
    assert watched.watch.limit(0) == 300
    for step in range(2, 5):
        watched.wait(100)
        watched.beat("training", step)
    assert watched.wait(900) == []
    assert watched.wait(101) == [0, 1]


def test_the_first_batch_of_a_validation_may_be_compiled():
    watched = Watched(hang_s=10, first_step_s=30)
    watched.beat("training", 5)
    watched.beat("validating", 5)
    assert watched.wait(30) == []
    watched.beat("validating", 5)
    assert watched.wait(10) == []
    assert watched.wait(1) == [0, 1]


def test_zero_is_no_limit():
    watched = Watched(hang_s=0, save_s=0)
    for phase in ("training", "validating", "saving"):
        watched.beat(phase)
        assert watched.wait(10**4) == []


def test_time_in_which_the_supervisor_stood_still_does_not_count():
    watched = Watched(hang_s=10)
    watched.beat("training", 1)
    watched.now += 10**5
    assert watched.wait(7) == []
    assert watched.wait(3) == [0, 1]


def _step(slowest: int, behind: float) -> dict[str, object]:
    return {
        "event": "step",
        "seconds": 1.0,
        "slowest_rank": slowest,
        "slowest_rank_behind_seconds": behind,
    }


def test_a_rank_that_lags_step_after_step_is_told_once():
    lag = LagWatch()
    told = [lag.take(_step(2, 0.5)) for _ in range(50)]
    assert [text for text in told if text] == [told[19]]
    assert "rank 2 lags" in told[19] and "2.0 times" in told[19]


def test_ranks_that_take_turns_in_being_slow_are_no_news():
    lag = LagWatch()
    assert not any(lag.take(_step(step // 19 % 2, 0.5)) for step in range(200))
    assert not any(lag.take(_step(1, 0.2)) for _ in range(50))
    assert lag.take({"event": "valid", "iteration": 3}) is None


def test_a_stopped_rank_whose_last_word_is_old_has_done_the_steps_that_the_others_tell():
    watched = Watched(hang_s=10)
    watched.beat("training", 16)
    stands = {0: Stand("S", ""), 1: Stand("T", "")}
    told = judge_hang(watched.watch, stands, [], reached=18)
    assert told.reason.startswith("rank 1 hangs: training after step 18,")
    assert judge_hang(watched.watch, stands, []).reason.startswith("rank 1 hangs: training after step 16,")
