from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dense_oracle import dense, error, tensors

from megaplug.errors import UserError
from megaplug.layers.attention import (
    RingDilatedAttention,
    RingMultiheadDilatedAttention,
    Sizes,
    describe,
    dilated_attention,
)

PATTERN = ([8, 32], [1, 4])


@pytest.mark.parametrize("again", [False, True])
def test_the_module_is_the_function_and_may_compute_again(again):
    inputs, grad = tensors(32, 4, 2)
    module = RingDilatedAttention(*PATTERN, use_checkpointing=again)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = module(*inputs, is_causal=True)
    wanted = dense(*inputs, *PATTERN)
    grads = (torch.autograd.grad(x, inputs, grad) for x in (out, wanted))
    assert error([out, *next(grads)], [wanted, *next(grads)]) < 1e-12
    q, k, _ = inputs
    assert sum(kept) == q.numel() + 2 * k.numel() + (0 if again else q.numel() + 32 * 4)


def test_the_multihead_module_is_projections_around_it():
    torch.manual_seed(0)
    module = RingMultiheadDilatedAttention(32, 4, *PATTERN).double()
    x = torch.randn(2, 32, 32, dtype=torch.float64)
    out, weights = module(x, x, x, is_causal=True)
    assert weights is None
    q, k, v = (p(x).unflatten(-1, (4, 8)) for p in (module.q_proj, module.k_proj, module.v_proj))
    heads = torch.nn.functional.layer_norm(dense(q, k, v, *PATTERN).flatten(2), (32,))
    assert error([out], [module.out_proj(heads)]) < 1e-12
    assert torch.equal(module(x, is_causal=True)[0], out)
    assert not torch.equal(module(x)[0], out)


def test_gamma_is_the_gain_of_values_and_output_and_the_norm_can_be_left_out():
    torch.manual_seed(0)
    module = RingMultiheadDilatedAttention(256, 4, *PATTERN, gamma_init=3.0, layer_norm=False, bias=False)
    for projection, gain in (
        (module.q_proj, 1),
        (module.k_proj, 1),
        (module.v_proj, 3),
        (module.out_proj, 3),
    ):
        assert projection.weight.std().item() == pytest.approx(gain / math.sqrt(256), rel=0.02)
        assert projection.bias is None
    assert isinstance(module.norm, torch.nn.Identity)


def test_what_cannot_be_is_refused_with_what_to_do():
    with pytest.raises(UserError, match="no dropout") as raised:
        RingMultiheadDilatedAttention(32, 4, *PATTERN, dropout=0.1)
    assert "torch.nn.Dropout" in raised.value.hint
    with pytest.raises(UserError, match="ring_size is 3814, and 1 ranks"):
        RingDilatedAttention(*PATTERN, ring_size=3814)
    with pytest.raises(UserError, match="5 heads do not divide an embedding of 32"):
        RingMultiheadDilatedAttention(32, 5, *PATTERN)
    with pytest.raises(UserError, match="7 heads do not divide an embedding of 256") as raised:
        RingMultiheadDilatedAttention(256, 7, *PATTERN)
    assert raised.value.hint == "use 8 heads"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 1.5}, "block_size is 1.5"),
        ({"block_size": True}, "block_size is True"),
        ({"block_size": "8"}, "block_size is '8'"),
        ({"offset": "x"}, "no offset 'x'"),
        ({"layout": "zz"}, "no token layout 'zz'"),
        ({"mix_grad": "some"}, "no mix_grad 'some'"),
        ({"kernel": "cuda"}, "no block kernel 'cuda'"),
        ({"merge": "numpy"}, "no merge 'numpy'"),
        ({"group": "x"}, "group is 'x'"),
        ({"dropout": -0.1}, "no dropout of its weights; -0.1"),
        ({"dropout": math.nan}, "no dropout of its weights; nan"),
        ({"segment_lengths": 64}, "segment_lengths is 64"),
        ({"segment_lengths": [8, 1.5]}, "segment_lengths has 1.5"),
        ({"dilation_rates": [1, True]}, "dilation_rates has True"),
        ({"embed_dim": -8}, "embed_dim is -8"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 8.0}, "num_heads is 8.0"),
        ({"gamma_init": -1}, "gamma_init is -1"),
        ({"gamma_init": None}, "gamma_init is None"),
    ],
)
def test_what_is_wrong_is_said_when_a_module_is_made(wrong, said):
    given = {"segment_lengths": [8, 32], "dilation_rates": [1, 4], **wrong}
    with pytest.raises(UserError, match=said) as raised:
        RingMultiheadDilatedAttention(**{"embed_dim": 32, "num_heads": 4, **given})
    assert raised.value.hint
    if not {"embed_dim", "num_heads", "gamma_init"} & set(wrong):
        with pytest.raises(UserError, match=said):
            RingDilatedAttention(**given)


@pytest.mark.parametrize("wrong", [{"block_size": 1.5}, {"offset": "x"}, {"group": "x"}, {"layout": "zz"}])
def test_the_function_says_the_same_as_the_modules(wrong):
    with pytest.raises(UserError, match=str(*wrong.values())) as raised:
        dilated_attention(*tensors(32)[0], *PATTERN, **wrong)
    assert raised.value.hint


def test_numpys_integers_are_integers():
    lengths, rates, number = np.array(PATTERN[0]), np.array(PATTERN[1]), np.int64(16)
    module = RingMultiheadDilatedAttention(np.int64(32), np.int32(4), lengths, rates, block_size=number)
    assert module.attention.segment_lengths == PATTERN[0]
    x = torch.randn(1, 32, 32)
    plain = RingMultiheadDilatedAttention(32, 4, *PATTERN)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], plain(x)[0])
    inputs = tensors(32)[0]
    assert torch.equal(
        dilated_attention(*inputs, lengths, rates, block_size=number), dilated_attention(*inputs, *PATTERN)
    )


def test_a_module_takes_the_kernel_and_the_merge():
    inputs = tensors(32)[0]
    reference = RingDilatedAttention(*PATTERN, kernel="reference", merge="torch")
    assert reference.options["kernel"] == "reference"
    assert error([reference(*inputs)], [RingDilatedAttention(*PATTERN)(*inputs)]) < 1e-12
    with pytest.raises(UserError, match="kernel=cudnn does not run on cpu"):
        RingDilatedAttention(*PATTERN, kernel="cudnn")(*inputs)


def test_costs_are_counted_from_the_pattern():
    """A row of the cost table in LongNet's sizes: 128K tokens on 8 ranks."""
    kib = 1024
    sizes = Sizes(128 * kib, 32, 8, 128)
    lengths, rates = [8 * kib * 2**i for i in range(5)], [2**i for i in range(5)]
    found = describe(sizes, lengths, rates, num_ranks=8)
    assert found["dense_over_dilated"] == pytest.approx(8.26, rel=2e-3)
    assert found["coverage"] == [1, 1, 1, 1, 0.5]
    assert found["branches_without_communication"] == lengths[:2]
    assert found["received_bytes"]["largest"] == pytest.approx(71.3e6, rel=1e-3)
    assert found["received_bytes"]["mean"] == pytest.approx(35.7e6, rel=2e-3)
    assert found["saved_bytes"] == 16 * kib * (2 * (2 * 32 + 2 * 8) * 128 + 4 * 32)
    assert describe(sizes, lengths, rates, num_ranks=8, layout="zigzag")["received_bytes"]["mean"] > 90e6


def test_costs_are_of_the_mask_that_is_asked_for():
    module = RingMultiheadDilatedAttention(64, 4, *PATTERN)
    causal, all_pairs = (module.get_memory_info(32, is_causal=mask) for mask in (True, False))
    assert all_pairs["forward_flops"] == 4 * 16 * 4 * (4 * 8**2 + 8**2)
    assert causal["forward_flops"] == 4 * 16 * 4 * (4 * 8 * 9 // 2 + 8 * 9 // 2)
    sizes = Sizes(32, 4, 4, 16, 4)
    assert module.attention.get_memory_info(sizes, is_causal=False) == all_pairs


@pytest.mark.parametrize("tokens", [-1, 0, 4096.5, True])
def test_costs_of_no_tokens_are_refused(tokens):
    with pytest.raises(UserError, match=f"num_tokens is {tokens}"):
        RingMultiheadDilatedAttention(64, 4, *PATTERN).get_memory_info(tokens)


def test_costs_of_what_cannot_be_are_refused():
    with pytest.raises(UserError, match="5 key-value heads cannot be shared by 32 heads"):
        Sizes(4096, 32, 5, 128)
    sizes = Sizes(np.int64(4096), 32, 8, 128)
    with pytest.raises(UserError, match="no offset 'x'"):
        describe(sizes, *PATTERN, offset="x")
    with pytest.raises(UserError, match="num_ranks is 0"):
        describe(sizes, *PATTERN, num_ranks=0)
    with pytest.raises(UserError, match="the sizes of a layer are 4096") as raised:
        RingDilatedAttention(*PATTERN).get_memory_info(4096)
    assert "Sizes(num_tokens, num_heads" in raised.value.hint


def test_the_billion_token_pattern_sees_no_further_than_its_segments():
    """3,814 ranks of 262,144 tokens: nothing is sent, since no token sees beyond its own rank's."""
    module = RingMultiheadDilatedAttention(64, 4, [65536, 131072, 262144], [1, 2, 4])
    sizes = Sizes(64 * 262144, 4, 4, 16)
    found = describe(sizes, module.attention.segment_lengths, module.attention.dilation_rates, num_ranks=64)
    assert found["received_bytes"] == {"mean": 0, "largest": 0}
    assert found["receptive_field"] == 262144
    assert module.get_memory_info(1024)["receptive_field"] == 1024
