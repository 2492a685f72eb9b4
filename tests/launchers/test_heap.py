"""A rank on a CPU keeps the memory that tensors let go of, unless somebody has set the allocator himself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megaplug.launchers.heap import keeping_freed_memory

# Pages that were filled with zeros for tensors as large as those of the steps before.
_STEPS = """
import resource
def step():
    several = [bytearray(24 << 20) for _ in range(3)]
    for one in several:
        one[::4096] = b"x" * len(one[::4096])
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(added: dict[str, str]) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", _STEPS]
    return int(subprocess.run(command, env=plain | added, capture_output=True, check=True, timeout=60).stdout)


def test_no_page_is_asked_for_again() -> None:
    words = keeping_freed_memory({})
    assert words
    assert faults(words) < 100 < 1000 < faults({})


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX"])
def test_what_a_person_has_set_holds(name: str) -> None:
    assert keeping_freed_memory({name: "1"}) == {}


def test_an_older_library_takes_no_larger_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.31")
    assert f"mmap_threshold={32 * 2**20}:" in keeping_freed_memory({})["GLIBC_TUNABLES"]


def test_another_library_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown)
    assert keeping_freed_memory({}) == {}
