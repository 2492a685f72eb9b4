from __future__ import annotations

import itertools

import pytest
import torch
from dense_oracle import dense, detached, error, multiplicity, tensors, with_grads
from hypothesis import given, settings
from hypothesis import strategies as st

from megaplug.errors import UserError
from megaplug.layers.attention import dilated_attention, ring_attention
from megaplug.layers.attention.block_kernels import KERNELS
from megaplug.layers.attention.pattern import OFFSETS, Heads

# Equal segments, tails, segments longer than the sequence, rates that divide nothing, rows in no branch.
PATTERNS = [
    ((8, 16), (1, 2)),
    ((7, 100), (1, 3)),
    ((8, 12, 24), (2, 4, 8)),
    ((6,), (3,)),
    ((4, 10, 40), (1, 3, 5)),
    ((4,), (9,)),
]
HEADS = [(4, 4), (4, 1), (6, 2), (6, 6)]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_equal_one_softmax_over_all_pairs(causal, offset):
    for num_tokens, heads, batch, pattern in itertools.product((24, 37), HEADS, (1, 2), PATTERNS):
        inputs, grad = tensors(num_tokens, *heads, batch)
        found, wanted = (
            with_grads(lambda *x, f=f, p=pattern: f(*x, *p, causal=causal, offset=offset), inputs, grad)
            for f in (dilated_attention, dense)
        )
        assert error(found, wanted) < 1e-12, (num_tokens, heads, batch, pattern)


@pytest.mark.parametrize("kernel", ["reference", "cpu_flash"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 0.05)])
def test_other_number_formats_and_kernels_are_near_it(kernel, dtype, bound):
    pattern = ((16, 64), (1, 4))
    inputs, grad = tensors(64, 4, 2, dtype=dtype)
    found = with_grads(lambda *x: dilated_attention(*x, *pattern, kernel=kernel), inputs, grad)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    assert error(found, with_grads(lambda *x: dense(*x, *pattern), wide, grad.double())) < bound
    assert all(x.dtype == dtype for x in found)


def test_bf16_is_as_near_to_fp64_as_torchs_own_attention():
    inputs, grad = tensors(2048, 4, 2, dim=32, dtype=torch.bfloat16)

    def sdpa(*x):
        heads_first = (tensor.transpose(1, 2) for tensor in x)
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = with_grads(sdpa, wide, grad.double())
    ours = error(with_grads(lambda *x: dilated_attention(*x, [2048], [1]), inputs, grad), wanted)
    assert ours <= 1.2 * error(with_grads(sdpa, inputs, grad), wanted)


def test_on_one_device_ring_attention_is_plain_attention():
    inputs, grad = tensors(33, 4, 2)
    for causal in (True, False):
        found = with_grads(lambda *x, c=causal: ring_attention(*x, causal=c), inputs, grad)
        wanted = with_grads(lambda *x, c=causal: dense(*x, [33], [1], causal=c), inputs, grad)
        assert error(found, wanted) < 1e-12


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_token_moves_itself_and_nothing_before_it(data):
    """Also what every published implementation of this fails at somewhere: leaks, shifts, dead heads."""
    count = data.draw(st.integers(1, 3), "branches")
    num_tokens = data.draw(st.integers(1, 40), "tokens")
    lengths = data.draw(st.lists(st.integers(1, 48), min_size=count, max_size=count), "lengths")
    rates = data.draw(st.lists(st.integers(1, 6), min_size=count, max_size=count), "rates")
    offset = data.draw(st.sampled_from(OFFSETS), "offset")
    num_heads, num_groups = data.draw(st.sampled_from(HEADS), "heads")
    token = data.draw(st.integers(0, num_tokens - 1), "token")
    (q, k, v), _ = tensors(num_tokens, num_heads, num_groups, dim=4)
    # A branch that everybody is in, so that every token is live.
    lengths, rates = [*lengths, data.draw(st.integers(1, 48), "window")], [*rates, 1]
    with torch.no_grad():
        before = dilated_attention(q, k, v, lengths, rates, offset=offset)
        for x in (q, k, v):
            x[:, token] += 1.0
        after = dilated_attention(q, k, v, lengths, rates, offset=offset)
    moved = (before != after).any(-1)[0]
    assert not moved[:token].any()
    assert moved[token].all()


def test_rows_in_no_branch_are_zeros_without_gradients():
    inputs, grad = tensors(12, 2, 2)
    out, d_q, d_k, d_v = with_grads(lambda *x: dilated_attention(*x, [12], [4]), inputs, grad)
    for head in range(2):
        unread = [token for token in range(12) if token % 4 != head]
        assert all(not x[0, unread, head].any() for x in (out, d_q, d_k, d_v))
        assert all(x[0, head::4, head].any() for x in (out, d_k, d_v))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("offset", OFFSETS)
def test_heads_sharded_by_tensor_parallelism_read_the_rows_of_the_whole_layer(ranks, offset):
    """Four ranks hold copies of two groups, as Megatron makes them; rate 3 divides no number of heads."""
    num_heads, num_groups = 8, 2
    inputs, _ = tensors(30, num_heads, num_groups)
    pattern = ((10, 30), (1, 3))
    whole = dilated_attention(*inputs, *pattern, offset=offset)
    here = num_heads // ranks
    for rank in range(ranks):
        first = rank * here
        groups = sorted({head // 4 for head in range(first, first + here)})
        part = [inputs[0][:, :, first : first + here], *(x[:, :, groups] for x in inputs[1:])]
        heads = Heads(here, len(groups), first, num_heads, num_heads // num_groups)
        found = dilated_attention(*part, *pattern, offset=offset, heads=heads)
        assert error([found], [whole[:, :, first : first + here]]) < 1e-12


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_key_moves_the_queries_that_read_it_and_no_other(data):
    """Causal or not, rows in no branch included, and whatever the gradient is to be."""
    pattern, causal, offset, heads, num_tokens = random_case(data)
    token = data.draw(st.integers(0, num_tokens - 1), "token")
    mix_grad = data.draw(st.sampled_from(("exact", "detached")), "mix_grad")
    (q, k, v), _ = tensors(num_tokens, *heads, dim=4)
    options = {"causal": causal, "offset": offset}
    with torch.no_grad():
        before = dilated_attention(q, k, v, *pattern, mix_grad=mix_grad, **options)
        v[:, token] += 1.0
        after = dilated_attention(q, k, v, *pattern, mix_grad=mix_grad, **options)
    reads = multiplicity(num_tokens, *heads, *pattern, **options)[:, :, token] > 0
    assert torch.equal((before != after).any(-1)[0], reads.t())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pattern_is_exact(data):
    pattern, causal, offset, heads, num_tokens = random_case(data)
    mix_grad = data.draw(st.sampled_from(("exact", "detached")), "mix_grad")
    inputs, grad = tensors(num_tokens, *heads, dim=4)
    options = {"causal": causal, "offset": offset}
    found = with_grads(lambda *x: dilated_attention(*x, *pattern, mix_grad=mix_grad, **options), inputs, grad)
    oracle = dense if mix_grad == "exact" else detached
    assert error(found, with_grads(lambda *x: oracle(*x, *pattern, **options), inputs, grad)) < 1e-12


def random_case(data):
    """Segments and rates, whether causal, an offset, heads, and a number of tokens."""
    count = data.draw(st.integers(1, 3), "branches")
    lengths = data.draw(st.lists(st.integers(1, 48), min_size=count, max_size=count), "lengths")
    rates = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count), "rates")
    return (
        (lengths, rates),
        data.draw(st.booleans(), "causal"),
        data.draw(st.sampled_from(OFFSETS), "offset"),
        data.draw(st.sampled_from([*HEADS, (8, 2)]), "heads"),
        data.draw(st.integers(1, 40), "tokens"),
    )


@pytest.mark.parametrize("offset", OFFSETS)
def test_detached_mixing_has_the_same_output_and_torchscales_gradient(offset):
    for causal, heads, pattern in itertools.product((True, False), HEADS, PATTERNS):
        inputs, grad = tensors(37, *heads, batch=2)
        options = {"causal": causal, "offset": offset}
        found, exact, wanted = (
            with_grads(lambda *x, f=f, p=pattern, o=options | more: f(*x, *p, **o), inputs, grad)
            for f, more in (
                (dilated_attention, {"mix_grad": "detached"}),
                (dilated_attention, {"mix_grad": "exact"}),
                (detached, {}),
            )
        )
        assert error(found, wanted) < 1e-12, (causal, heads, pattern)
        assert error(exact[:1], wanted[:1]) < 1e-12
        if pattern == PATTERNS[0]:
            assert error(exact[1:3], wanted[1:3]) > 1e-3


@pytest.mark.parametrize("num_branches", [1, 2, 5])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_branches(num_branches):
    kept = []
    (q, k, v), _ = tensors(64, 4, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        dilated_attention(
            q, k, v, [4 * 2**i for i in range(num_branches)], [2**i for i in range(num_branches)]
        )
    assert sum(kept) == 2 * q.numel() + k.numel() + v.numel() + 64 * 4


def test_what_does_not_fit_is_refused_with_its_sizes():
    (q, k, v), _ = tensors(8, 4, 2)
    with pytest.raises(UserError, match="2 segment_lengths and 1 dilation_rates"):
        dilated_attention(q, k, v, [4, 8], [1])
    with pytest.raises(UserError, match="dilation_rates has 0"):
        dilated_attention(q, k, v, [4], [0])
    with pytest.raises(UserError, match=r"keys \(1, 8, 3, 8\)"):
        dilated_attention(q, k[:, :, :1].expand(-1, -1, 3, -1), v, [4], [1])
    with pytest.raises(UserError, match="no offset 'heads'"):
        dilated_attention(q, k, v, [4], [1], offset="heads")
    with pytest.raises(UserError, match="no mix_grad 'learned'"):
        dilated_attention(q, k, v, [4], [1], mix_grad="learned")
    with pytest.raises(UserError, match=f"auto, {', '.join(KERNELS)}"):
        dilated_attention(q, k, v, [4], [1], kernel="flashest")
    with pytest.raises(UserError, match=r"float64, torch.float32"):
        dilated_attention(q, k.float(), v, [4], [1])
