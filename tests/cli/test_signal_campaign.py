"""A part of the campaign of signals, whose sixty are a command: ``benchmarks/signal_campaign.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.signal_campaign import campaign
from benchmarks.sittings import Asked

pytestmark = pytest.mark.soak


def test_signals_at_random_moments_end_a_run_in_time_and_change_nothing_of_it(tmp_path: Path) -> None:
    runs = campaign(Asked(tmp_path, number=5, world_sizes=[1], seed=3, seconds=60.0))
    assert [run.failure for run in runs if run.failure] == []
    assert sum(len(run.blows) for run in runs) >= 3
