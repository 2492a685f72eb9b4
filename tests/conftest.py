"""What all tests share: one thread a process, and a fork server that has imported Megatron."""

from __future__ import annotations

import gc

import pytest
import ranks
from small_jobs import SmallJobs

ranks.start_parent()

# With a file to a worker, a long one that is begun last keeps one worker busy and the others idle: these took
# the most of one, the longest first.
LONG_FILES = (
    "cli/test_docs.py",
    "cli/test_slurm_jobs.py",
    "cli/test_sweep.py",
    "cli/test_survival.py",
    "cli/test_killed_in_saving.py",
    "parity/test_resume.py",
    "parity/test_topologies_agree.py",
    "parity/test_context_parallel.py",
    "plan/test_memory_against_rehearsals.py",
    "benchmarks/test_gpu_drive.py",
    "cli/test_hangs.py",
    "plan/test_preset_parameters.py",
    "parity/test_upcycling.py",
    "runtime/test_chosen_packages.py",
    "cli/test_failures.py",
    "parity/test_plain_megatron.py",
    "parity/test_sharding.py",
    "parity/test_rehearsal_against_run.py",
    "runtime/test_async_saving.py",
    "cli/test_nodes_command.py",
    "cli/test_signal_campaign.py",
    "cli/test_third_party_layer.py",
    "runtime/test_saving.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, in the order of their list; all else stays as it was collected."""
    root = config.rootpath / "tests"
    places = {root / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(LONG_FILES)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: composing is a fifth slower while cycles are looked for in it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small_jobs(tmp_path_factory: pytest.TempPathFactory) -> SmallJobs:
    """Jobs of this session, which share a corpus and a cache."""
    return SmallJobs(tmp_path_factory.mktemp("small"))
