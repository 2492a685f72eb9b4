"""Which failures are tried again, and how often."""

from __future__ import annotations

import pytest

from megaplug.launchers.restarts import Restarts
from megaplug.launchers.verdict import Outcome


def failed(kind: str, iteration: int = 7, saved: int = 5, rank: int = 1, **more: bool) -> Outcome:
    return Outcome("failed", iteration, saved, f"rank {rank}: {kind}", rank, 1, kind=kind, **more)


def started_again(restarts: Restarts, *failures: Outcome, began_at: int = 5) -> list[str]:
    """Why none, for each failure in order; a failure that is tried again is counted."""
    said = []
    for failure in failures:
        said.append(restarts.why_not(failure, began_at))
        if not said[-1]:
            if restarts.take(failure, began_at, failure.saved_iteration) is None:
                said[-1] = restarts.enough
            began_at = failure.saved_iteration
    return said


@pytest.mark.parametrize(
    "kind", ["killed", "crashed", "hang", "peer", "data", "nan", "transient", "error", ""]
)
def test_what_may_be_chance_is_tried_again(kind):
    assert started_again(Restarts(1), failed(kind)) == [""]


@pytest.mark.parametrize("kind", ["config", "disk", "persistent", "reproducible"])
def test_what_would_be_again_is_not(kind):
    assert "again" in Restarts(9).why_not(failed(kind), 5)


def test_nothing_is_started_again_unless_that_was_asked_for():
    assert "watch.max_restarts" in Restarts(0).why_not(failed("killed"), 5)


def test_whoever_was_told_to_stop_stays_stopped():
    assert "told to stop" in Restarts(9).why_not(failed("error", signal="SIGTERM"), 5)


@pytest.mark.parametrize(
    ("kind", "again"), [("error", False), ("exit", False), ("", False), ("memory", False)]
)
def test_a_failure_before_the_first_step_would_be_again(kind, again):
    assert bool(Restarts(9).why_not(failed(kind, iteration=5), 5)) != again
    assert Restarts(9).why_not(failed(kind, iteration=6), 5) == ""


@pytest.mark.parametrize("kind", ["killed", "helper", "hang", "peer", "crashed"])
def test_a_start_can_meet_what_comes_from_outside(kind):
    assert Restarts(9).why_not(failed(kind, iteration=5), 5) == ""


def test_the_same_failure_at_the_same_step_is_enough():
    said = started_again(Restarts(9), failed("error"), failed("error"))
    assert said[0] == "" and "the same failure" in said[1]


def test_another_rank_or_step_or_kind_is_another_failure():
    others = [
        failed("error"),
        failed("error", rank=0),
        failed("error", iteration=8),
        failed("hang", iteration=8),
    ]
    assert started_again(Restarts(9), *others) == [""] * 4


@pytest.mark.parametrize("kind", ["killed", "helper"])
def test_what_was_killed_may_be_killed_again_at_the_same_step(kind):
    assert started_again(Restarts(2), failed(kind), failed(kind)) == ["", ""]


def test_a_new_checkpoint_begins_a_new_row():
    restarts = Restarts(1)
    said = started_again(restarts, failed("killed"), failed("killed", 12, 10), failed("killed", 13, 10))
    assert said[:2] == ["", ""] and "once without a new checkpoint" in said[2]
    assert [restart.number for restart in restarts.done] == [1, 2]
    assert restarts.in_a_row == 1


def test_the_same_device_cannot_say_twice_who_is_right():
    said = started_again(Restarts(9), failed("unexplained", 6, 6), failed("unexplained", 6, 6), began_at=5)
    assert said[0] == "" and "another device" in said[1]


def test_whether_a_failure_would_come_again_is_known_also_where_none_is_tried():
    restarts = Restarts(0)
    restarts.why_not(failed("nan"), 5)
    assert not restarts.comes_again
    restarts.why_not(failed("disk"), 5)
    assert restarts.comes_again
    again = Restarts(1)
    started_again(again, failed("nan"), failed("nan"))
    assert again.comes_again


def test_a_step_that_was_computed_twice_on_the_only_device_comes_again_to_the_same_command():
    restarts = Restarts(0)
    restarts.why_not(failed("unexplained", 6, 6), 5)
    assert not restarts.comes_again
    restarts.why_not(failed("unexplained", 6, 6, rank=0), 6)
    assert restarts.comes_again
