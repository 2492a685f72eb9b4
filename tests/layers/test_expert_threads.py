"""Experts side by side on the threads of a CPU: each once, the same numbers, and no thread left at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from megaplug.layers.experts import threads
from megaplug.layers.experts.in_cache import swiglu_experts
from megaplug.layers.experts.threads import for_all_experts

EVEN, UNEVEN = (4, 4, 4, 4), (0, 5, 1, 0, 3, 4, 2, 3)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Seen:
    """Who computes which experts; with two at work none ends before both have begun."""

    def __init__(self, workers: int) -> None:
        self._begun = threading.Barrier(workers, timeout=30)
        self.experts: list[int] = []
        self.threads: set[tuple[str, int, bool]] = set()

    def work(self, experts: Iterator[int]) -> None:
        self._begun.wait()
        # Name, threads of an operator, whether gradients would be recorded.
        self.threads.add((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))
        for expert in experts:
            self.experts.append(expert)


@pytest.mark.usefixtures("two_threads")
def test_each_expert_is_computed_once_on_one_of_two_threads() -> None:
    seen = Seen(2)
    with torch.no_grad():
        for_all_experts(UNEVEN, seen.work)
    assert sorted(seen.experts) == list(range(len(UNEVEN)))
    assert seen.threads == {("MainThread", 1, False), ("experts_0", 1, False)}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("counts", [(1, 9, 1), (7,), (0, 0)])
def test_an_expert_that_others_would_wait_for_has_all_threads(counts: tuple[int, ...]) -> None:
    seen = Seen(1)
    with torch.no_grad():
        for_all_experts(counts, seen.work)
    assert seen.experts == list(range(len(counts)))
    assert seen.threads == {("MainThread", 2, False)}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("in_main", [True, False])
def test_what_fails_is_raised_when_no_thread_is_at_work(in_main: bool) -> None:
    ended = []
    both = threading.Barrier(2, timeout=30)

    def work(experts: Iterator[int]) -> None:
        both.wait()
        if (threading.current_thread() is threading.main_thread()) == in_main:
            raise ArithmeticError("planted")
        ended.extend(experts)

    with pytest.raises(ArithmeticError, match="planted"):
        for_all_experts(EVEN, work)
    assert sorted(ended) == [0, 1, 2, 3]
    assert torch.get_num_threads() == 2


def outputs_and_gradients(counts: tuple[int, ...], dtype: torch.dtype, number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((sum(counts), 16), (sum(counts),), (len(counts), 48, 16), (len(counts), 16, 24))
    leaves = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    torch.set_num_threads(number)
    out = swiglu_experts(*leaves, counts)
    gradient = torch.randn(out.shape, generator=generator).to(dtype)
    return [out, *torch.autograd.grad(out, leaves, gradient)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("counts", [EVEN, UNEVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_one_thread_bit_for_bit(
    counts: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    helped = []
    real = threads._with_one_thread
    monkeypatch.setattr(threads, "_with_one_thread", lambda *given: (helped.append(1), real(*given)))
    alone = outputs_and_gradients(counts, dtype, 1)
    assert not helped
    together = outputs_and_gradients(counts, dtype, 2)
    assert len(helped) == 2  # forward and backward
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))
