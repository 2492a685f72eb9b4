"""The planner's count of dilated and ring attention against the one that goes through the messages."""

from __future__ import annotations

import itertools

import pytest

from megaplug.layers import registry
from megaplug.layers.attention.describe import Sizes, describe
from megaplug.layers.attention.pattern import Heads, branches, pairs_of_branch
from megaplug.layers.attention.share import share_of_rank
from megaplug.layers.attention.token_layout import TokenLayout
from megaplug.layers.registry.sequence_cost import SequenceSizes

PATTERNS = {
    "one segment": ([64], [1]),
    "local and not": ([8, 32, 64], [1, 2, 4]),
    "no segment divides": ([7, 24, 100], [1, 3, 5]),
    "rows in no branch": ([24, 64], [3, 6]),
}


def counted(name, sizes, **params):
    plugin = registry.lookup(registry.CORE_ATTENTION, name)
    assert plugin.sequence_cost is not None
    return plugin.sequence_cost(sizes, params)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("offset", ["kv_group", "query_head", "torchscale_block"])
def test_pairs_and_keys_are_those_of_the_messages(pattern, offset):
    lengths, rates = PATTERNS[pattern]
    for layout, ranks, heads in itertools.product(
        ("zigzag", "contiguous"), (1, 2, 4, 8), ((4, 2), (4, 4), (6, 3))
    ):
        tokens = TokenLayout(layout, 64, ranks)
        shares = [
            share_of_rank(branches(lengths, rates), tokens, rank, Heads(*heads), offset, True)
            for rank in range(ranks)
        ]
        found = counted(
            "ring_dilated",
            SequenceSizes(64, *heads, ranks),
            segment_lengths=lengths,
            dilation_rates=rates,
            offset=offset,
            token_layout=layout,
        )
        # A key and a value of one element each.
        assert 2 * found.received == max(share.elements_received(1) for share in shares), (layout, ranks)
        total = sum(
            pairs_of_branch(64, branch, each, causal=True)
            for branch in branches(lengths, rates)
            for each in Heads(*heads).offsets(offset, branch.rate)
        )
        if ranks == 1:
            assert found.pairs == total
        assert total / ranks <= found.pairs <= total


def test_operations_and_bytes_are_those_that_describe_tells():
    lengths, rates = [2048, 4096, 16384], [1, 2, 4]
    told = describe(Sizes(16384, 8, 4, 64), lengths, rates, num_ranks=1)
    found = counted("dilated", SequenceSizes(16384, 8, 4), segment_lengths=lengths, dilation_rates=rates)
    assert 4 * 64 * found.pairs == told["forward_flops"]
    told = describe(Sizes(16384, 8, 4, 64), lengths, rates, num_ranks=4)
    sizes = SequenceSizes(16384, 8, 4, 4)
    params = {"segment_lengths": lengths, "dilation_rates": rates, "token_layout": "contiguous"}
    found = counted("ring_dilated", sizes, **params)
    assert 2 * 64 * 2 * found.received == told["received_bytes"]["largest"]


def test_a_causal_zigzag_is_balanced_and_contiguous_tokens_are_not():
    sizes = SequenceSizes(4096, 8, 2, 8)
    whole = 8 * 4096 * 4097 // 2
    assert counted("ring", sizes, token_layout="zigzag").pairs == whole // 8
    # The last of 8 ranks has 15 of 64 equal squares, less half a diagonal.
    assert counted("ring", sizes, token_layout="contiguous").pairs == pytest.approx(whole * 15 / 64, rel=1e-3)


def test_segments_that_ranks_have_whole_cost_no_bytes():
    sizes = SequenceSizes(4096, 8, 2, 4)
    params = {"segment_lengths": [256, 1024], "dilation_rates": [1, 2]}
    assert counted("ring_dilated", sizes, **params, token_layout="contiguous").received == 0
    # A rank's two pieces of 512 tokens are halves of segments of 1,024.
    assert counted("ring_dilated", sizes, **params, token_layout="zigzag").received > 0
