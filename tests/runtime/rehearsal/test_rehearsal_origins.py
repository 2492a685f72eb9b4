"""What was there at a peak is told by who made it."""

from __future__ import annotations

import torch

from megaplug.runtime.rehearsal.book import ACTIVATIONS
from megaplug.runtime.rehearsal.origins import OriginBook


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_origins_are_those_of_the_peak_the_largest_first():
    book = OriginBook()
    kept, many = on_meta(256), [on_meta(512) for _ in range(2)]
    book.see(kept, ACTIVATIONS)
    for each in many:
        book.see(each, ACTIVATIONS)
    del many, each
    later = on_meta(128)
    book.see(later, ACTIVATIONS)
    counted = [line.split()[:4] for line in book.origins()]
    assert counted == [["2", "0.00", "MiB", "2048"], ["1", "0.00", "MiB", "1024"]]
    assert "test_rehearsal_origins" in book.origins()[0]
