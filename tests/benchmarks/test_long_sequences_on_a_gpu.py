"""What ``benchmarks/gpu.sh`` measures of long sequences, at sizes that need no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.gpu import drive

FOLDER = Path(drive.__file__).parent


@pytest.fixture
def step(monkeypatch):
    """A step's script as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.mark.parametrize("most", [100, 163, 640, 1000])
def test_the_longest_sequence_is_found_to_an_eighth(step, most):
    asked = []

    def attempt(tokens):
        asked.append(tokens)
        return {"failed": "out of memory"} if tokens > most else {}

    found = step("longest_sequence").search(attempt, 20, 60.0)
    assert found.is_finished and found.why == "out of memory"
    assert found.longest <= most < found.too_long
    assert found.too_long - found.longest <= max(20, found.longest // 8)
    assert len(asked) == len(set(asked)) and all(tokens % 20 == 0 for tokens in asked)


def test_a_search_whose_time_is_up_tells_what_it_has(step, monkeypatch):
    module = step("longest_sequence")
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    found = module.search(lambda tokens: {}, 20, 3.5)
    assert (found.longest, found.too_long, found.is_finished) == (80, None, False)


def test_not_one_unit_fits(step):
    found = step("longest_sequence").search(lambda tokens: {"failed": "out of memory"}, 20, 60.0)
    assert (found.longest, found.too_long, found.is_finished) == (0, 20, True)


def test_the_share_of_a_rank_receives_the_bytes_of_the_formula(step, tmp_path):
    module, setting = step("one_rank_share"), step("setting").Setting(tmp_path, tmp_path, "cpu", True)
    received = {}
    for case in module.CASES:
        short = module.shortened(case)
        row = module.measure(short, setting)
        got = row["received_bytes"]
        # Keys and values come a second time for the backward pass; the last rank sends none, and gets no
        # gradients.
        assert got.get("forward", 0) == got.get("keys again", 0) == row["formula_bytes_forward"]
        assert got.get("gradients", 0) == 0
        received[case.name] = got.get("forward", 0)
    assert received["1B over 4096, blocks of 256K"] == 0
    # All of the others' 7 x 64 tokens, of 4 groups of 16 elements, keys and values in fp32.
    assert received["1M over 8, dense ring"] == 7 * 64 * 4 * 16 * 2 * 4
