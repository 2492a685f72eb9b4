"""Ring and dilated attention as Megatron builds and calls them, on one rank; many are in tests/parity."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from dense_oracle import error
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
from megatron.core.transformer.enums import AttnMaskType

from megaplug.errors import UserError
from megaplug.layers.attention import dilated_attention, ring
from megaplug.layers.attention.flash import FlashAttention
from megaplug.layers.attention.megatron_tokens import batch_of_rank, spread_as
from megaplug.layers.attention.ring import DilatedAttention, RingAttention, RingDilatedAttention
from megaplug.layers.attention.token_layout import TokenLayout
from megaplug.layers.backend import core_attention_builder

PATTERN = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}


def make(cls, config, groups, **changes):
    return cls(config, 1, AttnMaskType.causal, "self", pg_collection=groups, **changes)


def tensors(num_heads=8, num_groups=2):
    torch.manual_seed(0)
    q = torch.randn(32, 2, num_heads, 8, dtype=torch.float64)
    k, v = torch.randn(2, 32, 2, num_groups, 8, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_on_one_rank_ring_attention_equals_flash(config, single_rank, mask):
    inputs = tensors()
    found = make(RingAttention, config(), single_rank)(*inputs, None, attn_mask_type=mask)
    flash = FlashAttention(config(), 1, AttnMaskType.causal, "self")
    assert found.shape == (32, 2, 64)
    assert error([found], [flash(*inputs, None, attn_mask_type=mask)]) < 1e-12


def test_the_core_attention_is_the_function_of_tensors(config, single_rank):
    inputs = tensors()
    for offset in ("kv_group", "query_head"):
        layer = make(RingDilatedAttention, config(), single_rank, **PATTERN, offset=offset, softmax_scale=0.5)
        by_batch = (x.transpose(0, 1) for x in inputs)
        wanted = dilated_attention(*by_batch, *PATTERN.values(), offset=offset, scale=0.5)
        assert error([layer(*inputs, None)], [wanted.transpose(0, 1).flatten(2)]) < 1e-12


@pytest.mark.parametrize("cls", [RingAttention, RingDilatedAttention])
def test_what_a_user_may_set_of_the_function_reaches_it(config, single_rank, monkeypatch, cls):
    found = {}
    monkeypatch.setattr(ring, "dilated_attention", lambda q, *_, **options: found.update(options) or q)
    make(cls, config(), single_rank, block_size=16, kernel="reference")(*tensors(), None)
    assert (found["block_size"], found["kernel"]) == (16, "reference")


def test_without_segments_it_takes_a_quarter_a_half_and_the_whole(config, single_rank):
    inputs = tensors()
    chosen = make(RingDilatedAttention, config(), single_rank)
    named = {"segment_lengths": [8, 16, 32], "dilation_rates": [1, 2, 4]}
    assert torch.equal(
        chosen(*inputs, None), make(RingDilatedAttention, config(), single_rank, **named)(*inputs, None)
    )


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("offset", ["kv_group", "query_head", "torchscale_block"])
def test_tensor_parallel_ranks_read_the_rows_of_the_whole_layer(config, single_rank, num_ranks, offset):
    """Of two groups: four ranks get copies, and Megatron's config with as many groups as ranks."""
    inputs = tensors()
    options = {**PATTERN, "offset": offset}
    whole = make(RingDilatedAttention, config(), single_rank, **options)(*inputs, None).unflatten(2, (8, 8))
    here = 8 // num_ranks
    for rank in range(num_ranks):
        groups = SimpleNamespace(cp=single_rank.cp, tp=SimpleNamespace(rank=lambda rank=rank: rank))
        heads = slice(rank * here, rank * here + here)
        group = rank * 2 // num_ranks
        part = [inputs[0][:, :, heads], *(x[:, :, group : group + 1] for x in inputs[1:])]
        build = core_attention_builder("ring_dilated", options, num_query_groups=2)
        changed = config(num_query_groups=num_ranks)
        layer = build(changed, 1, AttnMaskType.causal, "self", pg_collection=groups)
        assert error([layer(*part, None).unflatten(2, (here, 8))], [whole[:, :, heads]]) < 1e-12


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"window_size": (8, 0)}, "window_size"),
        ({"softmax_type": "learnable"}, "softmax_type=learnable"),
        ({"qk_clip": True}, "qk_clip"),
    ],
)
@pytest.mark.parametrize("cls", [RingAttention, RingDilatedAttention])
def test_what_it_does_not_have_is_refused_by_name(config, single_rank, cls, changes, named):
    with pytest.raises(UserError, match=named):
        make(cls, config(**changes), single_rank)


def test_calls_for_what_it_does_not_have_are_refused(config, single_rank):
    layer = make(RingAttention, config(), single_rank)
    inputs = tensors()
    with pytest.raises(UserError, match="packed sequences"):
        layer(*inputs, None, packed_seq_params=object())
    with pytest.raises(UserError, match="no attention bias"):
        layer(*inputs, None, attention_bias=torch.zeros(1))
    with pytest.raises(UserError, match="no padding mask"):
        layer(*inputs, None, attn_mask_type=AttnMaskType.padding)
    with pytest.raises(UserError, match="fancy"):
        make(RingAttention, config(), single_rank, fancy=True)
    with pytest.raises(UserError, match="2 segment_lengths and 1 dilation_rates"):
        make(RingDilatedAttention, config(), single_rank, segment_lengths=[4, 8], dilation_rates=[1])
    with pytest.raises(UserError, match="cannot split a sequence over 2 ranks"):
        make(DilatedAttention, config(context_parallel_size=2), single_rank)


def test_layers_and_batches_of_two_layouts_are_refused(config, single_rank):
    """The angles and batches of Megatron, or of what ``spread_as`` was given, have to be the layer's."""
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 2, rank=lambda: 0), tp=single_rank.tp)
    with pytest.raises(UserError, match="for contiguous tokens, and batches and angles are zigzag"):
        make(RingAttention, config(), groups, token_layout="contiguous")
    try:
        spread_as("contiguous")
        make(RingAttention, config(), groups, token_layout="contiguous")
        with pytest.raises(UserError, match="for zigzag tokens, and batches and angles are contiguous"):
            make(RingAttention, config(), groups)
    finally:
        spread_as("zigzag")


def test_contiguous_batches_and_angles_are_the_layouts_tokens():
    groups = [SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank) for rank in range(3)]
    tokens = torch.arange(24)[None]
    mask = torch.ones(1, 1, 24, 24)
    try:
        spread_as("contiguous")
        for rank, group in enumerate(groups):
            positions = TokenLayout("contiguous", 24, 3).positions(rank)
            batch = batch_of_rank({"tokens": tokens, "attention_mask": mask, "labels": None}, group)
            assert batch["tokens"].tolist() == [positions]
            assert batch["attention_mask"].shape == (1, 1, 8, 24)
            assert batch["labels"] is None
            angles = rotary_pos_embedding.get_pos_emb_on_this_cp_rank(tokens.t()[:, None, None], 0, group)
            assert angles.flatten().tolist() == positions
            # Megatron keeps them: those of other ranks must not be kept with them.
            assert angles.untyped_storage().nbytes() == 8 * angles.element_size()
    finally:
        spread_as("zigzag")
    assert rotary_pos_embedding.get_pos_emb_on_this_cp_rank is rope_utils.get_pos_emb_on_this_cp_rank
    with pytest.raises(UserError, match="no token layout 'striped'"):
        spread_as("striped")


def test_the_kernel_is_named(config, single_rank):
    layer = make(RingAttention, config(params_dtype=torch.bfloat16), single_rank)
    assert "cpu flash_attention" in layer.kernel_name()
