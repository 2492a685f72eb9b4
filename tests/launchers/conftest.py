"""Fixtures of the launchers' tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_ranks import FakeJob


@pytest.fixture
def job(tmp_path: Path) -> FakeJob:
    return FakeJob(tmp_path)


@pytest.fixture
def is_alive():
    def alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    return alive
