"""What runs beside a GPU neither makes the host wait for it nor reads what is not there yet."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megaplug.job.facts import DataFacts, Part
from megaplug.runtime.communication import CommunicationClock
from megaplug.runtime.source_losses import KEY, SourceLosses


@pytest.fixture
def sources() -> SourceLosses:
    parts = [Part(name, 0.5, f"/data/{name}", 10, 1) for name in ("one", "two")]
    counts = {"train": 10}, {"train": 1}
    found = SourceLosses(DataFacts("f", {}, *counts, 257, None, "text", 256, "t", blends={"valid": parts}))
    found._current = ["one", "two"]
    return found


def test_losses_of_sources_are_summed_apart(sources: SourceLosses) -> None:
    losses = torch.tensor([[1.0, 2.0], [4.0, float("inf")], [16.0, 32.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    found = sources.report(torch.tensor([0, 1, 0]), losses, mask)
    assert found[f"{KEY}one"].tolist() == [1 + 2 + 16, 3]
    assert found[f"{KEY}two"].tolist() == [float("inf"), 2]


def test_a_cuda_graph_can_hold_the_losses_of_sources(sources: SourceLosses) -> None:
    """A shape that depends on values makes the host wait, which a capture forbids: fakes have no values."""
    with FakeTensorMode():
        found = sources.report(torch.zeros(3, dtype=torch.long), torch.zeros(3, 2), torch.ones(3, 2))
    assert [tuple(loss.shape) for loss in found.values()] == [(2,), (2,)]


class _Event:
    """A CUDA event that has happened once the host has waited for it."""

    def __init__(self) -> None:
        self.has_happened = False

    def synchronize(self) -> None:
        self.has_happened = True

    def elapsed_time(self, end: _Event) -> float:
        if not end.has_happened:
            raise RuntimeError("both events must be completed before calculating elapsed time")
        return 250.0


def test_communication_on_a_side_stream_is_waited_for() -> None:
    clock = CommunicationClock(on_cpu=False)
    clock.begin()
    clock._pairs += [("dp", _Event(), _Event()), ("dp", _Event(), _Event())]
    assert clock.take() == {"dp": 0.5}
