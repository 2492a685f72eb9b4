"""Layouts, patterns and shares as integers: no tensor, no process group."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from dense_oracle import multiplicity
from hypothesis import given, settings
from hypothesis import strategies as st

from megaplug.errors import UserError
from megaplug.layers.attention.describe import rows_awaited
from megaplug.layers.attention.pattern import (
    OFFSETS,
    Heads,
    Steps,
    branches,
    coverage,
    head_sets,
    pairs_of_branch,
)
from megaplug.layers.attention.share import share_of_rank
from megaplug.layers.attention.share_blocks import share_in_blocks
from megaplug.layers.attention.token_layout import LAYOUTS, TokenLayout


def places(rows):
    for segment in range(rows.segments):
        for row in range(rows.count):
            yield rows.base + segment * rows.length + rows.offset + row * rows.rate


def pairs(share, layout, rank, heads):
    """Every (head, query, key) that a share computes, as tokens, one by one."""
    positions = [layout.positions(each) for each in range(layout.num_ranks)]
    per_group = heads.num_heads // heads.num_groups

    def of_call(call, queries, keys):
        groups, within = (range(1 << 20)[x.slice] for x in (call.heads.groups, call.heads.heads))
        for group, head in itertools.product(groups, within):
            for (i, query), (j, key) in itertools.product(enumerate(queries), enumerate(keys)):
                if not call.causal or j <= i:
                    yield group * per_group + head, query, key

    for call in share.own:
        assert call.queries
        queries, keys = ([list(places(rows)) for rows in each] for each in (call.queries, call.keys))
        # Segments are sequences of their own.
        for segment in range(call.queries[0].segments):
            cut = [
                [positions[rank][place] for rows in each
                 for place in rows[segment * len(rows) // call.queries[0].segments :
                                   (segment + 1) * len(rows) // call.queries[0].segments]]
                for each in (queries, keys)
            ]  # fmt: skip
            yield from of_call(call, *cut)
    for step in share.steps:
        for call in step.calls:
            queries = [positions[rank][place] for rows in call.queries for place in places(rows)]
            keys = [
                positions[step.from_rank][place]
                for entry in call.entries
                for place in places(step.received[entry].rows)
            ]
            yield from of_call(call, queries, keys)


PATTERNS = [
    ((4, 16), (1, 2)),
    ((6, 48), (1, 3)),
    ((5, 7, 100), (2, 3, 5)),
    ((12, 24), (4, 8)),
]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_ranks_together_compute_every_pair_as_often_as_branches_have_it(num_ranks, name, offset):
    for causal, (num_heads, num_groups), (lengths, rates) in itertools.product(
        (True, False), ((4, 2), (3, 3)), PATTERNS
    ):
        heads, layout = Heads(num_heads, num_groups), TokenLayout(name, 48, num_ranks)
        pattern = branches(lengths, rates)
        count = torch.zeros(num_heads, 48, 48, dtype=torch.int64)
        for rank in range(num_ranks):
            share = share_of_rank(pattern, layout, rank, heads, offset, causal)
            for head, query, key in pairs(share, layout, rank, heads):
                count[head, query, key] += 1
        wanted = multiplicity(48, num_heads, num_groups, lengths, rates, causal=causal, offset=offset)
        assert torch.equal(count, wanted), (causal, lengths, rates)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_one_rank_sends_is_what_the_other_awaits(name):
    heads, layout = Heads(4, 2), TokenLayout(name, 48, 4)
    for causal, (lengths, rates) in itertools.product((True, False), PATTERNS):
        shares = [
            share_of_rank(branches(lengths, rates), layout, rank, heads, "kv_group", causal)
            for rank in range(4)
        ]
        for rank, share in enumerate(shares):
            for number, step in enumerate(share.steps):
                other = shares[step.to_rank].steps[number]
                assert other.from_rank == rank
                assert other.received == step.sent


@pytest.mark.parametrize("block_size", [1, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_in_blocks_no_message_is_larger_and_every_pair_is_computed_as_often(name, block_size):
    heads, layout = Heads(6, 3), TokenLayout(name, 48, 4)
    for causal, (lengths, rates) in itertools.product((True, False), PATTERNS):
        arguments = (branches(lengths, rates), layout)
        options = (heads, "kv_group", causal)
        shares = [share_in_blocks(*arguments, rank, *options, block_size) for rank in range(4)]
        for rank, share in enumerate(shares):
            whole = share_in_blocks(*arguments, rank, *options, None)
            assert whole == share_of_rank(*arguments, rank, *options)
            assert share.elements_received(8) == whole.elements_received(8)
            found, wanted = (Counter(pairs(each, layout, rank, heads)) for each in (share, whole))
            assert found == wanted
            for entries in (entries for step in share.steps for entries in (step.sent, step.received)):
                assert sum(e.rows.count * e.heads.groups.count for e in entries) <= block_size * 3
            for step, other in zip(
                share.steps, zip(*(each.steps for each in shares), strict=True), strict=True
            ):
                assert other[step.to_rank].received == step.sent


def received(layout, segment_length, rate, *, heads, offset="kv_group", causal=True):
    """Elements that each rank receives for one branch, a head having one element."""
    pattern = branches([segment_length], [rate])
    return [
        share_of_rank(pattern, layout, rank, heads, offset, causal).elements_received(1)
        for rank in range(layout.num_ranks)
    ]


@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_contiguous_tokens_cost_the_causal_minimum(num_ranks, rate):
    """``2 G (C / r) (rank mod S)`` elements, S ranks to a segment; nothing where a rank has whole
    segments."""
    part = 16
    layout, heads = TokenLayout("contiguous", part * num_ranks, num_ranks), Heads(8, 4)
    for ranks_a_segment in (1, 2, num_ranks):
        found = received(layout, part * ranks_a_segment, rate, heads=heads)
        assert found == [2 * 4 * (part // rate) * (rank % ranks_a_segment) for rank in range(num_ranks)]
    for length in (4, 8, 16):
        assert received(layout, length, rate, heads=heads) == [0] * num_ranks


@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_zigzag_tokens_cost_what_later_halves_need(num_ranks, rate):
    """Of a whole sequence ``2P - 2 - p`` of the others' halves; of segments of T halves T - 1 for both of
    mine."""
    half = 16
    layout, heads = TokenLayout("zigzag", 2 * half * num_ranks, num_ranks), Heads(8, 4)
    unit = 2 * 4 * (half // rate)
    found = received(layout, 2 * half * num_ranks, rate, heads=heads)
    assert found == [unit * (2 * num_ranks - 2 - rank) for rank in range(num_ranks)]
    assert received(layout, half, rate, heads=heads) == [0] * num_ranks
    for halves in (2, 4, 8):
        if halves <= num_ranks:
            found = received(layout, halves * half, rate, heads=heads)
            assert found == [unit * (halves - 1)] * num_ranks


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_sent_is_what_is_read_and_the_formula_says_how_much(data):
    """Any pattern, causal or not, either layout: each needed key once for each offset that its group has."""
    num_ranks = data.draw(st.sampled_from((2, 3, 4)), "ranks")
    layout = TokenLayout(data.draw(st.sampled_from(LAYOUTS), "layout"), 48, num_ranks)
    length, rate = data.draw(st.integers(1, 60), "length"), data.draw(st.integers(1, 9), "rate")
    num_heads, num_groups = data.draw(st.sampled_from([(4, 2), (3, 3), (8, 2)]), "heads")
    causal, offset = data.draw(st.booleans(), "causal"), data.draw(st.sampled_from(OFFSETS), "offset")
    heads, (branch,) = Heads(num_heads, num_groups), branches([length], [rate])
    reads = multiplicity(48, num_heads, num_groups, [length], [rate], causal=causal, offset=offset)
    for rank in range(num_ranks):
        positions = layout.positions(rank)
        others = [token for token in range(48) if token not in positions]
        # [head, key]: whether any query of this rank reads it; heads of a group share what is sent, and
        # their offsets being different they read no row twice.
        read = reads[:, positions][:, :, others].sum(1) > 0
        needed = read.unflatten(0, (num_groups, -1)).any(1).sum().item()
        share = share_of_rank((branch,), layout, rank, heads, offset, causal)
        assert share.elements_received(1) == 2 * needed
        assert rows_awaited(branch, heads, layout, rank, rule=offset, causal=causal) == needed


def test_offsets_by_query_head_cost_more_bytes():
    layout = TokenLayout("contiguous", 64, 4)
    by_group = received(layout, 64, 4, heads=Heads(8, 2))
    assert received(layout, 64, 4, heads=Heads(8, 2), offset="query_head") == [4 * x for x in by_group]


def test_under_zigzag_every_rank_computes_as_much():
    layout, heads = TokenLayout("zigzag", 64, 4), Heads(4, 4)
    for length in (4, 8, 16, 32, 64):
        shares = [
            share_of_rank(branches([length], [2]), layout, rank, heads, "kv_group", True) for rank in range(4)
        ]
        found = {sum(1 for _ in pairs(share, layout, rank, heads)) for rank, share in enumerate(shares)}
        if length in (4, 8, 64):
            assert len(found) == 1, length


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_hold_every_token_once(name):
    layout = TokenLayout(name, 24, 3)
    assert sorted(token for rank in range(3) for token in layout.positions(rank)) == list(range(24))
    wanted = {"contiguous": [*range(8, 16)], "zigzag": [*range(4, 8), *range(16, 20)]}
    assert layout.positions(1) == wanted[name]


def test_sequences_that_cannot_be_cut_are_refused():
    with pytest.raises(UserError, match="20 tokens cannot be cut into 8 equal parts") as raised:
        TokenLayout("zigzag", 20, 4)
    assert "multiple of 8" in raised.value.hint
    with pytest.raises(UserError, match="no token layout 'striped'"):
        TokenLayout("striped", 20, 4)


def test_heads_of_one_offset_go_together():
    assert len(head_sets(Heads(8, 8), "kv_group", 1)) == 1
    sets = head_sets(Heads(8, 4), "kv_group", 2)
    assert [(s.offset, s.groups, s.heads) for s in sets] == [
        (0, Steps(0, 2, 2), Steps(0, 2)),
        (1, Steps(1, 2, 2), Steps(0, 2)),
    ]
    assert coverage(Heads(8, 4), "kv_group", 16) == 0.25
    assert coverage(Heads(8, 4), "query_head", 16) == 0.5


def test_pairs_of_a_branch_are_counted_with_its_tail():
    (branch,) = branches([8], [2])
    for offset, causal in itertools.product((0, 1), (True, False)):
        count = multiplicity(21, 2, 2, [8], [2], causal=causal, offset="kv_group")
        assert pairs_of_branch(21, branch, offset, causal=causal) == count[offset].sum()
