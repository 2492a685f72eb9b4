"""Experts on the threads of a CPU, each expert on one.

The matrix products of an expert with few rows are too small to be shared out among threads, which would wait
for each other after every operator; whole experts are not.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def for_all_experts(counts: Sequence[int], work: Callable[[Iterator[int]], None]) -> None:
    """Have all experts computed, side by side unless one of them alone would keep the others waiting.

    No number depends on how they are shared out.

    Args:
        counts: Rows of each expert.
        work: Takes experts, by number, until none is left; called once on each of torch's threads, at the
            same time, with one iterator for all. What it raises is raised here when no thread works any more.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not any(counts) or max(counts) * threads > sum(counts):
        work(iter(range(len(counts))))
        return
    # The longest first, so that none is begun when the other threads are done.
    experts = iter(sorted(range(len(counts)), key=lambda expert: -counts[expert]))
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(_with_one_thread, work, experts) for _ in range(threads - 1)]
    try:
        torch.set_num_threads(1)
        work(experts)
    finally:
        failures = [other.exception() for other in others]
        torch.set_num_threads(threads)
    for failure in failures:
        if failure is not None:
            raise failure


@functools.lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(workers, "experts")


def _with_one_thread(work: Callable[[Iterator[int]], None], experts: Iterator[int]) -> None:
    torch.set_num_threads(1)  # of this thread
    with torch.no_grad():  # likewise; an autograd function's own thread is told so by torch
        work(experts)
