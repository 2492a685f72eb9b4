"""Output layer and cross-entropy in chunks against both at once, losses and gradients.

Tolerances: 1e-12 in fp64 and 1e-6 in fp32, of losses of about 4 and gradients of about 1, whose sums are
taken in another order. In bf16 no further from the fp64 answer than unchunked, with a tenth to spare.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from megaplug.errors import UserError
from megaplug.layers.chunked_loss import Cut, chunked_cross_entropy, output_layer_loss
from megaplug.layers.cross_entropy import vocab_parallel_cross_entropy

ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
TOKENS, BATCH, CHANNELS, WORDS = 12, 3, 16, 50
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-6}


def numbers(dtype=torch.float64):
    """Hidden states, weight, targets and a gradient of the losses in which some tokens do not count."""
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, BATCH, CHANNELS, dtype=torch.float64, generator=random)
    weight = torch.randn(WORDS, CHANNELS, dtype=torch.float64, generator=random) / 4
    targets = torch.randint(WORDS, (TOKENS, BATCH), generator=random)
    grads = torch.rand(TOKENS, BATCH, dtype=torch.float64, generator=random)
    grads[grads < 0.3] = 0
    return hidden.to(dtype), weight.to(dtype), targets, grads / grads.sum()


def losses_and_gradients(function, hidden, weight, grads):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    losses = function(*leaves)
    losses.backward(grads.to(losses.dtype))
    return [losses.detach(), *(leaf.grad for leaf in leaves)]


def unchunked(hidden, weight, targets, factor=1.0, group=ALONE):
    return vocab_parallel_cross_entropy((hidden @ weight.t()) * factor, targets, group)


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize(("chunk", "factor"), [(1, 1.0), (7, 1.0), (7, 0.5), (36, 1.0), (1000, 1.0)])
def test_chunks_change_neither_losses_nor_gradients(dtype, chunk, factor):
    hidden, weight, targets, grads = numbers(dtype)
    cut = Cut(chunk, ALONE, factor=factor)
    found = losses_and_gradients(
        lambda h, w: chunked_cross_entropy(h, w, targets, cut), hidden, weight, grads
    )
    right = losses_and_gradients(lambda h, w: unchunked(h, w, targets, factor), hidden, weight, grads)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=WITHIN[dtype], atol=WITHIN[dtype])


def test_bf16_in_many_chunks_is_as_exact_as_unchunked():
    """The weight's gradient is a sum over chunks: in bf16 it would lose a bit with every few of them."""
    hidden, weight, targets, grads = numbers(torch.bfloat16)
    cut = Cut(2, ALONE)
    exact = losses_and_gradients(
        lambda h, w: unchunked(h, w, targets), hidden.double(), weight.double(), grads
    )
    found = losses_and_gradients(
        lambda h, w: chunked_cross_entropy(h, w, targets, cut), hidden, weight, grads
    )
    theirs = losses_and_gradients(lambda h, w: unchunked(h, w, targets), hidden, weight, grads)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours_, theirs_, right in zip(found, theirs, exact, strict=True):
        assert (ours_.double() - right).norm() <= 1.1 * (theirs_.double() - right).norm() + 1e-6


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, targets, grads = numbers()
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, weight, targets, Cut(5, ALONE)).backward(grads)
    assert weight.grad is None
    assert hidden.grad is not None


def test_a_layer_that_is_not_megatrons_is_refused():
    hidden, _, targets, _ = numbers()
    with pytest.raises(UserError, match="ColumnParallelLinear without a bias, not Linear"):
        output_layer_loss(torch.nn.Linear(CHANNELS, WORDS), hidden, targets, 4)


def peak_and_kept(chunk):
    """Bytes at the fullest moment of forward and backward, and kept between them, of 4,096 tokens in bf16."""
    from megaplug.runtime.rehearsal.meter import Meter

    kept: list[torch.Tensor] = []
    with Meter() as meter:
        make = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
        hidden, weight = torch.empty(4096, 1, 64, **make), torch.empty(8192, 64, **make)
        targets = torch.empty(4096, 1, dtype=torch.int64, device="meta")
        meter.start()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            if chunk is None:
                loss = unchunked(hidden, weight, targets)
            else:
                loss = chunked_cross_entropy(hidden, weight, targets, Cut(chunk, ALONE))
        start = meter.book.total
        loss.backward(torch.empty_like(loss))
        peak = meter.book.peak - start
    leaves = {x.untyped_storage()._cdata for x in (hidden, weight)}
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    return peak, sum(size for place, size in storages.items() if place not in leaves)


def test_neither_peak_nor_what_is_kept_has_the_logits_of_all_tokens():
    logits = 2 * 4096 * 8192
    peak, kept = peak_and_kept(None)
    assert kept >= logits
    chunked_peak, chunked_kept = peak_and_kept(256)
    # Three numbers a token: log-sum, target and whether another rank has it.
    assert chunked_kept == 4096 * (4 + 8 + 1)
    # A chunk's logits, in bf16 and as fp32 while they become their gradient; gradients of both operands,
    # the weight's in fp32, of all chunks so far and of one.
    chunk, operands = 256 * 8192 * (2 + 4), 2 * 4096 * 64 + (4 + 4) * 8192 * 64
    assert chunked_peak <= chunk + operands + 64 * 4096
    assert chunked_peak < (peak + kept) / 3


def on_two_ranks(store):
    """Rank's largest differences from one device, by name."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.utils import GlobalMemoryBuffer

    torch.cuda.current_device = lambda: "cpu"
    parallel_state._GLOBAL_MEMORY_BUFFER = GlobalMemoryBuffer()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    differences = {}
    for dtype in WITHIN:
        hidden, weight, targets, grads = numbers(dtype)
        whole = functools.partial(unchunked, targets=targets)
        right = losses_and_gradients(whole, hidden, weight, grads)
        words = slice(rank * WORDS // 2, (rank + 1) * WORDS // 2)
        for sequence_parallel in (False, True):
            tokens = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
            tokens = tokens if sequence_parallel else slice(None)
            cut = Cut(7, group, sequence_parallel)
            part = functools.partial(chunked_cross_entropy, targets_SB=targets, cut=cut)
            found = losses_and_gradients(part, hidden[tokens], weight[words], grads)
            wanted = [right[0], right[1][tokens], right[2][words]]
            pairs = zip(found, wanted, strict=True)
            differences[str(dtype), sequence_parallel] = max(float((a - b).abs().max()) for a, b in pairs)
    dist.destroy_process_group()
    return differences


@pytest.mark.slow
def test_two_ranks_that_share_the_vocabulary_are_one_device(tmp_path):
    for found in run_ranks(2, on_two_ranks, str(tmp_path / "store"), folder=tmp_path / "ranks"):
        for (dtype, sequence_parallel), difference in found.items():
            within = {str(each): bound for each, bound in WITHIN.items()}[dtype]
            assert difference <= within, (dtype, sequence_parallel)
