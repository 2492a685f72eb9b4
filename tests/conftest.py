"""What all tests share: one thread a process, and a fork server that has imported Megatron."""

from __future__ import annotations

import pytest
import ranks
from small_jobs import SmallJobs

ranks.start_parent()


@pytest.fixture(scope="session")
def small_jobs(tmp_path_factory: pytest.TempPathFactory) -> SmallJobs:
    """Jobs of this session, which share a corpus and a cache."""
    return SmallJobs(tmp_path_factory.mktemp("small"))
