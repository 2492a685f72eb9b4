"""What the C library of a rank on a CPU does with memory that tensors let go of.

glibc gives the kernel back what is freed at the end of the heap and every large piece, and has it filled with
zeros, page by page, when the next tensor of that size comes: several thousand pages in each step of a small
model. CUDA's allocator keeps such memory, and so does the C library where it is told to; in pages of 2 MiB
where the kernel has them on request. Other C libraries do not know the variable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_VARIABLE = "GLIBC_TUNABLES"
# Before this version a larger threshold is refused, and with it the whole setting.
_FREE_THRESHOLD, _LARGEST_BEFORE = (2, 35), 32 * 2**20
_ALL = 2**40


def keeping_freed_memory(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment; nothing where a person has set the C library's allocator himself.

    Args:
        environment: That a process would have without it.

    Returns:
        ``GLIBC_TUNABLES`` (glibc's manual, "Memory Allocation Tunables"), or nothing.
    """
    is_set = any(name.startswith("MALLOC_") for name in environment) or _VARIABLE in environment
    version = _glibc_version()
    if is_set or version is None:
        return {}
    mapped = _ALL if version >= _FREE_THRESHOLD else _LARGEST_BEFORE
    words = [f"glibc.malloc.trim_threshold={_ALL}", f"glibc.malloc.mmap_threshold={mapped}"]
    return {_VARIABLE: ":".join([*words, "glibc.malloc.hugetlb=1"])}


def _glibc_version() -> tuple[int, ...] | None:
    try:
        said = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):  # another C library
        return None
    return tuple(map(int, said.split()[-1].split(".")[:2])) if said else None
