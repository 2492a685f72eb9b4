"""Timings that are taken in turns."""

from __future__ import annotations

import itertools

from benchmarks.measure import alternate


def test_what_is_done_before_a_run_is_done_before_each_and_not_timed():
    done, now = [], itertools.count()

    def before(name):
        done.append(f"before {name}")
        next(now)

    contenders = {name: (lambda name=name: done.append(name)) for name in "ab"}
    seconds = alternate(contenders, 2, "cpu", clock=lambda: next(now), before=before)
    assert done == ["before a", "a", "before b", "b"] * 3, "once more, to warm up"
    assert seconds == {"a": [1, 1], "b": [1, 1]}
