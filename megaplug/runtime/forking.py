"""What a fork costs the process that goes on: the kernel copies each page that it then writes to.

Half a second of faults for every gigabyte, in the middle of the next step. So another thread takes them while
the next batch is computed, and what no checkpoint needs is not shared in the first place.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence

import torch

_DONTFORK, _POPULATE_WRITE = 10, 23  # of Linux's madvise
_PAGE = 4096
_CHUNK = 4 << 20  # so short is the time for which memory can neither be taken nor given back
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

Ranges = list[tuple[int, int]]


def ranges_of(tensors: Iterable[torch.Tensor]) -> Ranges:
    """First address and the one after the last of what tensors fill on the CPU; what touches is joined."""
    ends = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.numel()
    )
    joined: Ranges = []
    for start, end in ends:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def keep_from_forks(tensors: Iterable[torch.Tensor]) -> None:
    """Processes that are forked from now on do not see the whole pages of these, and none is copied."""
    for start, end in ranges_of(tensors):
        first, last = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if last > first:
            _libc.madvise(first, last - first, _DONTFORK)


class Unsharing:
    """Has the kernel copy pages that a forked process shares, in a thread of its own, until it is done.

    Where the kernel cannot (before Linux 5.14) they are copied when they are written to, as ever.

    Args:
        ranges: From `ranges_of`.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ranges,), name="unsharing", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Before what it copies can be given back, or another process is forked."""
        self._stop.set()
        self._thread.join()

    def _run(self, ranges: Sequence[tuple[int, int]]) -> None:
        for start, end in ranges:
            for at in range(start // _PAGE * _PAGE, end, _CHUNK):
                size = min(_CHUNK, -(-(end - at) // _PAGE) * _PAGE)
                if self._stop.is_set() or _libc.madvise(at, size, _POPULATE_WRITE) != 0:
                    return
