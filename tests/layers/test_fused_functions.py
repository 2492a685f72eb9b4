"""The fused functions against Megatron's unfused ones and torch's, forward and backward.

Tolerances: in fp64 1e-12, a few last digits of sums; in fp32 and bf16 no further from the fp64 answer than
the unfused function is, with a fifth to spare for other roundings on the way. The cross-entropy does not move
the logits to a largest of 0 first: its loss may be off by their own rounding.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch.nn import functional as F

from megaplug.layers import cross_entropy
from megaplug.layers.attention import rotary
from megaplug.layers.attention.rotary import _cos_sin, split_and_rotate
from megaplug.layers.cross_entropy import vocab_parallel_cross_entropy
from megaplug.layers.swiglu import swiglu

ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
EXACT = 1e-12
SPARE = 1.2
ROUNDING = 2**-24  # of fp32, relative


def outputs_and_gradients(function, x, *grads):
    """What a function of one tensor gives, and the tensor's gradient."""
    leaf = x.clone().requires_grad_()
    # Not a leaf: a function may take its input's memory going backward.
    outputs = function(leaf * 1)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) for o, g in zip(outputs, grads, strict=True)])
    return [*(output.detach().double() for output in outputs), leaf.grad.double()]


def assert_as_exact_as(ours, unfused, x, *grads, floor=EXACT):
    """Against fp64, in fp64, fp32 and bf16."""
    exact = outputs_and_gradients(unfused, x, *grads)
    for a, b in zip(outputs_and_gradients(ours, x, *grads), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    for dtype in (torch.float32, torch.bfloat16):
        narrow_x, narrow_grads = x.to(dtype), [g.to(dtype) for g in grads]
        exact = outputs_and_gradients(unfused, narrow_x.double(), *(g.double() for g in narrow_grads))
        found = outputs_and_gradients(ours, narrow_x, *narrow_grads)
        theirs = outputs_and_gradients(unfused, narrow_x, *narrow_grads)
        for ours_, theirs_, right in zip(found, theirs, exact, strict=True):
            assert (ours_ - right).norm() <= SPARE * (theirs_ - right).norm() + floor * right.numel() ** 0.5


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def test_swiglu_is_megatrons_glu():
    def glu(x):
        gate, up = torch.chunk(x, 2, dim=-1)
        return F.silu(gate) * up

    assert_as_exact_as(swiglu, glu, random(9, 2, 24), random(9, 2, 12))


# A head that is rotated in part, a short one (its halves are swapped in a copy) and a long one.
@pytest.mark.parametrize(("head_dim", "rotated"), [(12, 8), (32, 32), (128, 128)])
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_split_and_rotate_is_megatrons_split_and_rope(head_dim, rotated, scale, as_on_cuda, monkeypatch):
    if as_on_cuda:
        monkeypatch.setattr(rotary, "_turns_whole", lambda *tensors: False)
    tokens, batch, groups, per_group = 7, 3, 2, 4
    mixed = random(tokens, batch, groups, (per_group + 2) * head_dim)
    angles = random(tokens, 1, 1, rotated) * 10
    grads = [random(tokens, batch, heads, head_dim) for heads in (groups * per_group, groups, groups)]

    def unfused(x):
        sizes = [per_group * head_dim, head_dim, head_dim]
        q, k, v = torch.split(x, sizes, dim=3)
        q = q.reshape(tokens, batch, -1, head_dim)
        return (*(_apply_rotary_pos_emb_bshd(t, angles, mscale=scale) for t in (q, k)), v)

    def ours(x):
        outputs = split_and_rotate(x, *_cos_sin(angles, scale, x.dtype), head_dim)
        assert all(output.is_contiguous() for output in outputs)
        return outputs

    assert_as_exact_as(ours, unfused, mixed, *grads)


@pytest.mark.parametrize("elements", [20, 1 << 19], ids=["in pieces", "at once"])
def test_cross_entropy_is_torchs(monkeypatch, elements):
    monkeypatch.setattr(cross_entropy, "_ELEMENTS_ON_CPU", elements)
    targets = torch.randint(11, (6, 3), generator=torch.Generator().manual_seed(0))

    def torchs(logits):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(6, 3)

    assert_as_exact_as(
        lambda logits: vocab_parallel_cross_entropy(logits, targets, ALONE),
        torchs,
        random(6, 3, 11) * 5,
        random(6, 3),
        floor=ROUNDING * 16,
    )


def test_cross_entropy_of_bf16_logits_is_as_exact_as_megatrons():
    logits = (random(64, 2, 50) * 8).bfloat16()
    targets = torch.randint(50, (64, 2))
    right = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none").view(64, 2)
    wide, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    *_, predicted, total, exp = VocabParallelCrossEntropy.calculate_predicted_logits(
        wide, targets, largest, 0, 50
    )
    _, theirs = VocabParallelCrossEntropy.calculate_cross_entropy_loss(exp, predicted, total)
    ours = vocab_parallel_cross_entropy(logits, targets, ALONE)
    assert ours.dtype == torch.float32
    assert (ours - right).abs().max() <= (theirs - right).abs().max() + ROUNDING * logits.abs().max()


def test_logits_that_the_backward_pass_has_spoilt_cannot_be_used_again():
    logits = random(4, 2, 5).requires_grad_() * 1
    loss = vocab_parallel_cross_entropy(logits, torch.zeros(4, 2, dtype=torch.long), ALONE).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
