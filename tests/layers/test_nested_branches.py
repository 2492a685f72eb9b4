"""Branches within one another: every pair once, weighed by how many branches have it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from dense_oracle import dense, error, multiplicity, tensors, with_grads

from megaplug.layers.attention import dilated_attention
from megaplug.layers.attention.block_kernels import KERNELS
from megaplug.layers.attention.calls import Repeats, Rows
from megaplug.layers.attention.kernels import cpu, weighing
from megaplug.layers.attention.kernels.cpu import CpuFlash
from megaplug.layers.attention.kernels.interface import Block
from megaplug.layers.attention.nesting import nested_calls
from megaplug.layers.attention.pattern import Heads, branches, pairs_of_branch
from megaplug.layers.attention.share import share_of_rank
from megaplug.layers.attention.token_layout import LAYOUTS, TokenLayout

# Each with the numbers of the branches that nest in 48 tokens: twice and three times as long, as long, both
# in one step, rates that stay or begin at 2, a branch of another kind between, segments beyond the sequence,
# smallest segments that do not all begin in the same way for the last.
NESTED = [
    ((12, 24, 48), (1, 2, 4), (0, 1, 2)),
    ((8, 24, 48), (1, 2, 4), (0, 1, 2)),
    ((4, 48), (1, 2), (0, 1)),
    ((6, 24, 48), (1, 4, 8), (1, 2)),
    ((8, 8, 16), (1, 2, 4), (0, 1, 2)),
    ((12, 24, 48), (2, 2, 6), (0, 1, 2)),
    ((6, 12, 24), (1, 3, 3), (0, 1, 2)),
    ((8, 12, 16), (1, 2, 2), (0, 2)),
    ((24, 96), (1, 2), (0, 1)),
    ((6, 12, 24), (1, 2, 4), (0, 1)),
]
# The first two, and apart from these the others.
TWICE = ((4, 8, 16, 48), (1, 1, 4, 8), (0, 1, 2, 3))
# Lengths and rates that do not divide, shorter last segments, rates too far apart, too many parts.
OTHERS = [
    ((8, 12), (1, 2)),
    ((12, 24), (2, 3)),
    ((7, 14), (1, 1)),
    ((16, 32), (1, 2)),
    ((8, 48), (1, 8)),
    ((9, 18, 36), (1, 2, 4)),
    ((4, 8), (1, 3)),
    ((4, 24), (1, 4)),
    ((12, 24), (2, 1)),
    ((24,), (1,)),
]
MOST = 1 << 24
HEADS = [(4, 4), (4, 2), (6, 3), (4, 1)]


def tokens_of(rows: Rows, positions: list[int]) -> list[list[int]]:
    """The tokens of each segment."""
    return [
        [positions[rows.base + n * rows.length + rows.offset + row * rows.rate] for row in range(rows.count)]
        for n in range(rows.segments)
    ]


def repeats_of(repeats: Repeats, place: int, num_rows: int) -> list[int]:
    """Of the rows of one group."""
    numbers = repeats.of_rows
    return [numbers[(row + place * repeats.shift) % len(numbers)] for row in range(num_rows)]


def counts(calls, positions, heads, num_tokens):
    """``[heads, queries, keys]``: how often a pair is computed, and how much it then counts in all."""
    computed, weight = torch.zeros(2, heads.num_heads, num_tokens, num_tokens, dtype=torch.int64)
    per_group = heads.num_heads // heads.num_groups
    for call in calls:
        queries, keys = (
            [
                [*itertools.chain(*each)]
                for each in zip(*(tokens_of(x, positions) for x in parts), strict=True)
            ]
            for parts in (call.queries, call.keys)
        )
        groups, within = (range(1 << 20)[x.slice] for x in (call.heads.groups, call.heads.heads))
        for place, group in enumerate(groups):
            times = torch.ones(len(queries[0]), len(keys[0]), dtype=torch.int64)
            if call.repeats:
                for (i, j), (q_more, k_more) in zip(
                    itertools.product(*(range(n) for n in times.shape)),
                    itertools.product(*(repeats_of(call.repeats, place, n) for n in times.shape)),
                    strict=True,
                ):
                    times[i, j] += min(q_more, k_more)
            mask = torch.ones_like(times).tril() if call.causal else torch.ones_like(times)
            for head, (q, k) in itertools.product(within, zip(queries, keys, strict=True)):
                index = group * per_group + head, torch.tensor(q)[:, None], torch.tensor(k)[None, :]
                computed[index] += mask
                weight[index] += mask * times
    return computed, weight


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "rates", "numbers"), NESTED)
def test_each_pair_is_computed_once_and_counts_as_often_as_branches_have_it(lengths, rates, numbers, causal):
    layout, pattern = TokenLayout("contiguous", 48), branches(lengths, rates)
    for num_heads, num_groups in HEADS:
        heads = Heads(num_heads, num_groups)
        calls = nested_calls(pattern, layout, 0, heads, "kv_group", causal, MOST)
        assert tuple(calls) == numbers
        lengths_, rates_ = ([each[number] for number in numbers] for each in (lengths, rates))
        computed, weight = counts(itertools.chain(*calls.values()), range(48), heads, 48)
        wanted = multiplicity(48, num_heads, num_groups, lengths_, rates_, causal=causal, offset="kv_group")
        assert torch.equal(weight, wanted)
        assert torch.equal(computed, (wanted > 0).long())


def test_of_branches_that_do_not_all_nest_some_may():
    lengths, rates, numbers = TWICE
    layout, heads = TokenLayout("contiguous", 48), Heads(8, 8)
    calls = nested_calls(branches(lengths, rates), layout, 0, heads, "kv_group", True, MOST)
    assert tuple(calls) == numbers
    whole = multiplicity(48, 8, 8, lengths, rates, causal=True, offset="kv_group")
    computed, weight = counts(itertools.chain(*calls.values()), range(48), heads, 48)
    assert torch.equal(weight, whole)
    assert computed.max() == 2 and computed.sum() < whole.sum()


@pytest.mark.parametrize(("lengths", "rates"), OTHERS)
def test_what_does_not_nest_is_left_alone(lengths, rates):
    arguments = (branches(lengths, rates), TokenLayout("contiguous", 48), 0, Heads(8, 8), "kv_group", True)
    assert nested_calls(*arguments, MOST) == {}
    assert share_of_rank(*arguments, MOST) == share_of_rank(*arguments)


def test_heads_whose_offsets_do_not_nest_are_left_alone():
    """Torchscale's, of which two have each; heads that share a group and have offsets of their own."""
    pattern, layout = branches((8, 16, 48), (1, 2, 4)), TokenLayout("contiguous", 48)
    for rule, heads, numbers in (
        ("torchscale_block", Heads(8, 8), ()),
        ("query_head", Heads(8, 8), (0, 1, 2)),
        ("query_head", Heads(8, 4), ()),
        ("kv_group", Heads(8, 4), (0, 1, 2)),
    ):
        assert tuple(nested_calls(pattern, layout, 0, heads, rule, True, MOST)) == numbers, (rule, heads)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_nest_the_segments_that_they_have_whole(num_ranks, name):
    """What is sent stays the same; what is local counts as often as branches have it."""
    layout, heads = TokenLayout(name, 64, num_ranks), Heads(4, 2)
    pattern = branches((4, 8, 16, 64), (1, 2, 4, 4))
    for causal, rank in itertools.product((True, False), range(num_ranks)):
        arguments = (pattern, layout, rank, heads, "kv_group", causal)
        nested, plain = (share_of_rank(*arguments, most) for most in (MOST, 0))
        assert nested.steps == plain.steps
        assert 0 < nested.num_covering == plain.num_covering
        (found, weight), (_, wanted) = (
            counts(each.own, layout.positions(rank), heads, 64) for each in (nested, plain)
        )
        assert torch.equal(weight, wanted)
        assert found.sum() < wanted.sum()


def test_a_fifth_of_the_benchmarks_pairs_is_computed_no_more():
    """Segments of 2,048 to 16,384 at rates of 1 to 8: 15 parts, of which 8 + 2 + 1 + 1/2 are left."""
    lengths, rates, tokens = (2048, 4096, 8192, 16384), (1, 2, 4, 8), 16384
    layout = TokenLayout("contiguous", tokens)
    arguments = (branches(lengths, rates), layout, 0, Heads(8, 8), "kv_group", True)
    pairs = [0, 0]
    for nests in (False, True):
        for call in share_of_rank(*arguments, MOST * nests).own:
            (queries,), (keys,) = call.queries, call.keys
            both = queries.count * (queries.count + 1) // 2 if call.causal else queries.count * keys.count
            pairs[nests] += both * queries.segments * call.heads.groups.count
    assert pairs[0] == 8 * sum(
        pairs_of_branch(tokens, each, 0, causal=True) for each in branches(lengths, rates)
    )
    a_square = 2048 * 2048
    assert pairs[1] == 8 * (8 * (a_square + 2048) // 2 + (4 + 2 + 1) * a_square // 4)
    assert pairs[1] / pairs[0] == pytest.approx(11.5 / 15, rel=1e-3)


def recorded(monkeypatch, kernel):
    """The blocks with repeats that a kernel gets, as they come."""
    blocks, forward = [], KERNELS[kernel].forward

    def record(block):
        blocks.extend([block] * bool(block.repeats))
        return forward(block)

    monkeypatch.setattr(KERNELS[kernel], "forward", record)
    return blocks


@pytest.mark.parametrize("kernel", ["cpu_flash", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_are_those_of_one_softmax(kernel, causal, monkeypatch):
    blocks = recorded(monkeypatch, kernel)
    patterns = [(*pattern[:2], True) for pattern in [*NESTED, TWICE]] + [(*x, False) for x in OTHERS]
    for number, (lengths, rates, nests) in enumerate(patterns):
        for (heads, batch), offset in itertools.product(
            zip(HEADS, (1, 2, 1, 2), strict=True), ("kv_group", "query_head", "torchscale_block")
        ):
            blocks.clear()
            inputs, grad = tensors(48, *heads, batch)
            found, wanted = (
                with_grads(lambda *x, f=f, o=o: f(*x, lengths, rates, causal=causal, **o), inputs, grad)  # noqa: B023
                for f, o in (
                    (dilated_attention, {"kernel": kernel, "offset": offset}),
                    (dense, {"offset": offset}),
                )
            )
            assert error(found, wanted) < 1e-12, (lengths, rates, heads, batch, offset)
            if offset == "kv_group":
                assert bool(blocks) == nests, number


@pytest.mark.parametrize(("num_tokens", "nests"), [(40, True), (56, False)])
def test_seven_parts_are_too_many_to_compute_one_after_another(num_tokens, nests):
    layout, pattern = TokenLayout("contiguous", num_tokens), branches((8, num_tokens), (1, 2))
    assert bool(nested_calls(pattern, layout, 0, Heads(4, 4), "kv_group", True, MOST)) == nests


@pytest.mark.parametrize("lengths", [(8, 16, 48), (16, 48, 48)])
def test_larger_squares_than_a_kernel_weighs_are_left_alone(lengths):
    """The first branch's, or the second's, which would be weighed for the third."""
    arguments = (
        branches(lengths, (1, 1, 2)),
        TokenLayout("contiguous", 48),
        0,
        Heads(4, 4),
        "kv_group",
        True,
    )
    for most, numbers in ((48**2, (0, 1, 2)), (lengths[1] ** 2 - 1, (0, 1)), (lengths[0] ** 2 - 1, ())):
        assert tuple(nested_calls(*arguments, most)) == numbers


def test_a_wrong_weight_is_seen(monkeypatch):
    """What the tests above compare with does not follow the code: too little a weight, or on other rows."""
    inputs, grad = tensors(48)
    pattern = ((12, 24, 48), (1, 2, 4))
    wanted = with_grads(lambda *x: dense(*x, *pattern), inputs, grad)

    def found():
        return with_grads(lambda *x: dilated_attention(*x, *pattern), inputs, grad)

    assert error(found(), wanted) < 1e-12
    for wrong in (
        lambda repeats: Repeats(tuple(min(n, 1) for n in repeats.of_rows), repeats.shift),
        lambda repeats: Repeats(repeats.of_rows[1:] + repeats.of_rows[:1], repeats.shift),
        lambda repeats: Repeats(repeats.of_rows, repeats.shift + 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                cpu, "mask_of",
                lambda block, wrong=wrong: weighing.mask_of(
                    replace(block, repeats=block.repeats and wrong(block.repeats))
                ),
            )  # fmt: skip
            assert error(found(), wanted) > 1e-3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("has_amx", [True, False])
def test_what_is_computed_in_fp32_is_weighed(dtype, bound, has_amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    blocks = recorded(monkeypatch, "cpu_flash")
    pattern = ((16, 64), (1, 2))
    inputs, grad = tensors(64, 4, 2, dtype=dtype)
    found = with_grads(lambda *x: dilated_attention(*x, *pattern), inputs, grad)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    assert error(found, with_grads(lambda *x: dense(*x, *pattern), wide, grad.double())) < bound
    assert all(x.dtype == dtype for x in found)
    assert bool(blocks) == (dtype == torch.float32 or not has_amx)


def test_detached_mixing_and_kernels_that_do_not_weigh_compute_every_branch(monkeypatch):
    pattern = ((8, 16), (1, 2))
    blocks = recorded(monkeypatch, "cpu_flash")
    inputs, _ = tensors(32)
    dilated_attention(*inputs, *pattern, mix_grad="detached")
    monkeypatch.setattr(CpuFlash, "most_weighed", lambda self, dtype: 0)
    dilated_attention(*inputs, *pattern)
    assert not blocks
    assert [name for name, kernel in KERNELS.items() if kernel.most_weighed(torch.float32)] == ["reference"]


@pytest.mark.parametrize(("heads", "at_once"), [((4, 4), 6), ((4, 1), 6), ((4, 2), 1)])
def test_heads_of_groups_are_weighed_a_few_segments_at_a_time(heads, at_once, monkeypatch):
    """One after another, so they are put together; where one call does for all, it is of all segments."""
    monkeypatch.setattr(KERNELS["cpu_flash"], "most_elements", 1)
    blocks = recorded(monkeypatch, "cpu_flash")
    inputs, grad = tensors(48, *heads)
    found, wanted = (
        with_grads(lambda *x, f=f: f(*x, (8, 16), (1, 2)), inputs, grad) for f in (dilated_attention, dense)
    )
    assert blocks[0].q.size(0) == at_once
    assert error(found, wanted) < 1e-12


def test_heads_share_the_memory_of_one_mask():
    """Eight heads with rows of their own: seven times seven rows and columns more than one has."""
    q = torch.empty(1, 64, 8, 4)
    mask = weighing.mask_of(Block(q, q, q, True, 1.0, Repeats((3, 0, 1, 0, 2, 0, 1, 0), 7)))
    assert mask.shape == (1, 8, 64, 64)
    assert mask.untyped_storage().nbytes() == 4 * (64 + 49) ** 2


def test_what_is_kept_is_no_larger_where_branches_nest():
    """Not even as the memory behind a view."""
    kept = {}
    (q, k, v), _ = tensors(64, 4, 2)

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = dilated_attention(q, k, v, (16, 32, 64), (1, 2, 4))
    assert sum(kept.values()) == 8 * (sum(x.numel() for x in (q, k, v, out)) + 64 * 4)
    assert out.is_contiguous()


def test_the_cpus_kernel_weighs_as_the_written_out_one_does():
    """Grouped heads, other offsets in each group, as many keys as queries or more."""
    pattern, layout = branches((12, 24, 48), (1, 2, 4)), TokenLayout("contiguous", 48)
    share = share_of_rank(pattern, layout, 0, Heads(8, 4), "kv_group", True, MOST)
    for call in (call for call in share.own if call.repeats):
        (rows,), (keys,) = call.queries, call.keys
        shapes = (rows.count, 2 * call.heads.groups.count), *[(keys.count, call.heads.groups.count)] * 2
        q, k, v = (torch.randn(2, *shape, 8, dtype=torch.float64) for shape in shapes)
        block = Block(q, k, v, call.causal, 0.3, call.repeats)
        results = [parts(block, name) for name in ("cpu_flash", "reference")]
        assert all(a.shape == b.shape for a, b in zip(*results, strict=True))
        assert error(*results) < 1e-12
        assert error(results[0], parts(replace(block, repeats=None), "reference")) > 1e-3


def parts(block, name):
    """Output, log-sum-exp, and gradients as of a part of a larger softmax."""
    out, lse = KERNELS[name].forward(block)
    return [out, lse, *KERNELS[name].backward(block, torch.ones_like(block.q), out * 0.5, lse + 0.7)]
