"""The meter splits memory and FLOPs by what runs, and answers where numbers are asked for."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaplug.runtime.rehearsal.balanced import shares
from megaplug.runtime.rehearsal.book import ACTIVATIONS, TEMPORARY
from megaplug.runtime.rehearsal.meter import BACKWARD, FORWARD, RECOMPUTED, Meter
from megaplug.runtime.rehearsal.traffic import Traffic, sent_bytes


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


def test_products_count_twice_their_multiplications_and_backward_twice_the_forward():
    meter = Meter()
    with meter:
        (on_meta(8, 16) @ on_meta(16, 4)).sum().backward()
    assert meter.flops == {FORWARD: 2 * 8 * 16 * 4, BACKWARD: 4 * 8 * 16 * 4}


def test_what_is_computed_again_is_told_from_backward():
    meter, x, w = Meter(), on_meta(8, 16), on_meta(16, 16)
    with meter:
        y = checkpoint(lambda x: (x @ w).relu(), x, use_reentrant=False, preserve_rng_state=False)
        meter.start()
        y.sum().backward()
    assert meter.flops[RECOMPUTED] == 2 * 8 * 16 * 16
    assert meter.flops[BACKWARD] == 4 * 8 * 16 * 16


def test_what_backward_makes_is_temporary_and_what_forward_makes_is_not():
    meter, x = Meter(), on_meta(1024)
    with meter:
        y = x.sin()
        y.sum().backward()
    assert meter.book.live[ACTIVATIONS] == 4096
    assert meter.book.at_peak[TEMPORARY] >= 4096


def test_of_one_kernel_only_what_outlives_it_takes_memory():
    def fused(x: torch.Tensor) -> torch.Tensor:
        return ((x * 2) * 3) * 4

    eager, compiled, x = Meter(), Meter(), torch.empty(1024, device="meta")
    with eager:
        fused(x)
    with compiled, compiled.one_kernel():
        y = fused(x)
    assert (eager.book.peak, compiled.book.peak) == (8192, 4096)
    assert y.shape == x.shape


def test_numbers_that_do_not_exist_are_answered():
    meter = Meter()
    with meter:
        loss = torch.empty((), device="meta")
        assert loss.item() == 1.0
        assert not loss.isnan()
        meter.part_selected = 0.25
        found = torch.empty(8, 4, device="meta").masked_select(
            torch.empty(8, 4, device="meta", dtype=torch.bool)
        )
    assert found.shape == (8,)


@pytest.mark.parametrize(("copies", "experts"), [(8, 4), (10, 4), (3, 8)])
def test_experts_share_a_ranks_tokens_evenly(copies, experts):
    found = shares(copies, experts)
    assert found.sum() == copies
    assert found.max() - found.min() <= 1


def test_a_ring_sends_each_part_once_and_an_all_reduce_twice():
    assert sent_bytes("all_reduce", 800, 8) == 1400
    assert sent_bytes("all_gather", 800, 8) == sent_bytes("reduce_scatter", 800, 8) == 700
    assert (sent_bytes("send", 800, 8), sent_bytes("recv", 800, 8)) == (800, 0)


def test_a_collective_that_nobody_knows_is_not_passed_over():
    with pytest.raises(AssertionError, match="gather_"):
        Traffic().count("gather_", ())
