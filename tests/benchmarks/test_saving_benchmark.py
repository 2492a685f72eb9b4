"""What the benchmark of saving reads from a run's events."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("saving")


def events(saved_at_step: int) -> list[dict[str, object]]:
    told: list[dict[str, object]] = []
    for step in range(1, 11):
        # Beside the writer of step 4 a step takes a second longer; the first pays for what is made once.
        seconds = 9.0 if step == 1 else 2.0 if 4 < step <= saved_at_step + 1 else 1.0
        told.append({"event": "step", "iteration": step, "seconds": seconds})
        if step == saved_at_step:
            told.append({"event": "saved", "iteration": 4, "seconds": 5.0, "stood_still": 0.5})
    # After the last step there is nothing to go on with.
    return [*told, {"event": "saved", "iteration": 10, "seconds": 7.0, "stood_still": 7.0}]


def test_steps_beside_a_writer_are_told_apart_and_the_last_save_is_left_out(benchmark: Any) -> None:
    found = benchmark.read(events(6), 100)
    assert (found.seconds, found.stood_still, found.step) == ([5.0], [0.5], 1.0)
    assert found.slowed == [pytest.approx(3.0)]


def test_the_stored_figures_keep_what_was_asked_of_saving() -> None:
    models = json.loads((BENCHMARKS / "results" / "saving_cpu.json").read_text())["models"]
    large, default = models["weights of 500 MB"], models["the default model"]
    assert large["checkpoint_bytes"] > 3 * 500e6
    assert large["stood_still_over_waiting"] < 0.1
    assert default["median"]["goes_on"]["stood_still"] < 0.5
