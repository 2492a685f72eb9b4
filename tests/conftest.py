"""What all tests share: one thread a process, and a fork server that has imported Megatron."""

from __future__ import annotations

import pytest
import ranks
from small_jobs import SmallJobs

ranks.start_parent()

# With a file to a worker, a long one that is begun last keeps one worker busy and the others idle: these took
# a minute or more of one, the longest first.
LONG_FILES = (
    "parity/test_resume.py",
    "cli/test_killed_in_saving.py",
    "benchmarks/test_gpu_drive.py",
    "cli/test_docs.py",
    "parity/test_topologies_agree.py",
    "plan/test_memory_against_rehearsals.py",
    "cli/test_search_reproduced.py",
    "cli/test_survival.py",
    "parity/test_context_parallel.py",
    "parity/test_plain_megatron.py",
    "parity/test_rehearsal_against_run.py",
    "cli/test_third_party_layer.py",
    "layers/test_flash_speed.py",
    "cli/test_signal_campaign.py",
    "runtime/test_saving.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, in the order of their list; all else stays as it was collected."""
    root = config.rootpath / "tests"
    places = {root / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(LONG_FILES)))


@pytest.fixture(scope="session")
def small_jobs(tmp_path_factory: pytest.TempPathFactory) -> SmallJobs:
    """Jobs of this session, which share a corpus and a cache."""
    return SmallJobs(tmp_path_factory.mktemp("small"))
