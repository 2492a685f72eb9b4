"""Many ranks against one device: each start of ranks computes all cases, the tests look at single ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from dense_oracle import error, tensors, with_grads
from ranks import run_ranks

from megaplug.layers.attention import dilated_attention, ring_attention
from megaplug.layers.attention.describe import rows_awaited
from megaplug.layers.attention.exchange import counted_traffic, num_elements
from megaplug.layers.attention.pattern import Heads, branches
from megaplug.layers.attention.share import share_of_rank
from megaplug.layers.attention.token_layout import LAYOUTS, TokenLayout

DTYPES = {"fp64": (torch.float64, 1e-12), "fp32": (torch.float32, 5e-6)}


class Case(NamedTuple):
    """64 tokens; ``lengths`` None is dense ring attention."""

    lengths: tuple[int, ...] | None
    rates: tuple[int, ...] = (1,)
    heads: tuple[int, int] = (4, 2)
    causal: bool = True
    offset: str = "kv_group"
    mix_grad: str = "exact"
    block_size: int | None = None


CASES = {
    "dense": Case(None),
    "dense both ways": Case(None, causal=False, heads=(4, 4)),
    "local": Case((4, 8), (1, 2)),
    "some local": Case((8, 32, 64), (1, 2, 4)),
    "both ways": Case((8, 64), (1, 4), causal=False),
    "no segment divides": Case((7, 24, 100), (1, 3, 5), (6, 3)),
    "rows in no branch": Case((24, 64), (3, 6), (3, 3)),
    "by query head": Case((16, 64), (1, 4), offset="query_head"),
    "by block of heads": Case((16, 64), (1, 3), (6, 2), offset="torchscale_block"),
    "detached": Case((16, 64), (1, 2), mix_grad="detached"),
    "dense in blocks": Case(None, block_size=5),
    "in blocks": Case((7, 24, 100), (1, 3, 5), (6, 3), block_size=3),
}


def attend(case: Case, inputs: Any, **where: Any) -> Any:
    where = {**where, "block_size": case.block_size}
    if case.lengths is None:
        return ring_attention(*inputs, causal=case.causal, **where)
    options = {"causal": case.causal, "offset": case.offset, "mix_grad": case.mix_grad}
    return dilated_attention(*inputs, case.lengths, case.rates, **options, **where)


def part_of(tensor: torch.Tensor, positions: list[int]) -> torch.Tensor:
    return tensor.detach()[:, positions].requires_grad_(tensor.requires_grad)


@contextmanager
def counted_operations() -> Iterator[dict[str, int]]:
    """Bytes of all that is given to torch to be sent and received, whatever the layer itself counts."""
    found = {"isend": 0, "irecv": 0}
    post = torch.distributed.batch_isend_irecv

    def count(operations: list[Any]) -> Any:
        for operation in operations:
            found[operation.op.__name__] += operation.tensor.numel() * operation.tensor.element_size()
        return post(operations)

    with mock.patch.object(torch.distributed, "batch_isend_irecv", count):
        yield found


def one_case(
    case: Case, dtype: torch.dtype, layout: str, group: Any
) -> tuple[float, dict[str, int], dict[str, int]]:
    """The largest error of this rank's part, what it received by its own count and by torch's operations."""
    inputs, grad = tensors(64, *case.heads, batch=2, dtype=dtype)
    wanted = with_grads(lambda *x: attend(case, x), inputs, grad)
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    mine = TokenLayout(layout, 64, size).positions(rank)
    parts = [part_of(x, mine) for x in inputs]
    with counted_traffic() as traffic, counted_operations() as operations:
        found = with_grads(
            lambda *x: attend(case, x, group=group, layout=layout), parts, grad[:, mine].contiguous()
        )
    return error(found, [x[:, mine] for x in wanted]), traffic.received, operations


def all_cases(store: str) -> dict[Any, Any]:
    """On every group of 2, 4, ... ranks that the world has room for."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found: dict[Any, Any] = {}
    for size in [2**i for i in range(1, world.bit_length())]:
        # All ranks make all groups, and each works in its own.
        groups = [torch.distributed.new_group(range(i, i + size)) for i in range(0, world, size)]
        group = groups[rank // size]
        for layout in LAYOUTS:
            for kind, case in BF16.items():
                found[size, layout, "bf16", kind] = errors_of_bf16(case, layout, group)
            found[size, layout, "kept"] = [kept(case, layout, group) for case in BRANCHES]
            for name, case in CASES.items():
                for kind, (dtype, _) in DTYPES.items():
                    found[size, layout, name, kind] = one_case(case, dtype, layout, group)
    return found


BF16 = {"dilated": Case((64, 256), (1, 2)), "dense": Case(None)}
BRANCHES = [Case(None), Case((16,), (1,)), Case((8, 16, 32, 48, 64), (1, 2, 3, 4, 5))]


def errors_of_bf16(case: Case, layout: str, group: Any) -> tuple[list[float], list[float], dict[str, int]]:
    """Squared errors against fp64 of this rank's output, dq, dk and dv: on the ranks, and on one device."""
    inputs, grad = tensors(256, 4, 2, dim=32, dtype=torch.bfloat16)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_grads(lambda *x: attend(case, x), exact_inputs, grad.double())
    alone = with_grads(lambda *x: attend(case, x), inputs, grad)
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    mine = TokenLayout(layout, 256, size).positions(rank)
    parts = [part_of(x, mine) for x in inputs]
    with counted_traffic() as traffic:
        here = with_grads(lambda *x: attend(case, x, group=group, layout=layout), parts, grad[:, mine])
    squares = (
        [(a.double() - b[:, mine]).square().sum().item() for a, b in zip(found, exact, strict=True)]
        for found in (here, [x[:, mine] for x in alone])
    )
    return *squares, traffic.received


def kept(case: Case, layout: str, group: Any) -> int:
    """Elements that wait for the backward pass."""
    sizes: list[int] = []
    inputs, _ = tensors(64 // torch.distributed.get_world_size(group), *case.heads)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attend(case, inputs, group=group, layout=layout)
    return sum(sizes)


def bf16_is_as_exact(answers, size):
    for layout in LAYOUTS:
        for kind in BF16:
            found = [each[size, layout, "bf16", kind] for each in answers]
            for number, name in enumerate(("out", "dq", "dk", "dv")):
                on_ranks, alone = (sum(each[which][number] for each in found) for which in (0, 1))
                assert (on_ranks / alone) ** 0.5 <= 1.1, (layout, size, kind, name)
            # On a CPU gradients come in fp32, and go back so.
            arrived = {what: sum(each[2].get(what, 0) for each in found) for what in ("forward", "gradients")}
            assert arrived["gradients"] == 2 * arrived["forward"]


def formula(case: Case, layout: str, size: int, rank: int) -> int:
    """Bytes of keys and values that arrive in fp64, of both sequences of the batch."""
    pattern = branches(case.lengths or (64,), case.rates)
    tokens, heads = TokenLayout(layout, 64, size), Heads(*case.heads)
    rows = sum(
        rows_awaited(branch, heads, tokens, rank, rule=case.offset, causal=case.causal) for branch in pattern
    )
    return rows * 2 * 8 * 8 * 2


def formula_of_gradients(case: Case, layout: str, size: int, rank: int) -> int:
    """Bytes of gradients that come back: of all that this rank sent."""
    pattern = branches(case.lengths or (64,), case.rates)
    share = share_of_rank(
        pattern, TokenLayout(layout, 64, size), rank, Heads(*case.heads), case.offset, case.causal
    )
    return sum(8 * num_elements(step.sent, 2, 8) for step in share.steps)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return run_ranks(4, all_cases, str(folder / "store"), folder=folder)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_device_finds(four_ranks, name, size, layout, kind):
    assert max(answers[size, layout, name, kind][0] for answers in four_ranks) < DTYPES[kind][1]


def bytes_are_those_of_the_formula(answers, name, layout, size):
    """Keys and values arrive once forward and once backward; gradients of what was sent come back."""
    case, sent, arrived = CASES[name], 0, 0
    for rank, each in enumerate(answers):
        _, received, operations = each[size, layout, name, "fp64"]
        wanted = formula(case, layout, size, rank % size)
        assert received.get("forward", 0) == received.get("keys again", 0) == wanted
        assert received.get("gradients", 0) == formula_of_gradients(case, layout, size, rank % size)
        assert operations["irecv"] == sum(received.values())
        sent, arrived = sent + operations["isend"], arrived + operations["irecv"]
    assert sent == arrived
    # A rank has the longest of these segments, of 8, whole; under zigzag eight ranks have parts of 4.
    is_local = name == "local" and TokenLayout(layout, 64, size).part_length >= 8
    assert (arrived == 0) == is_local


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_the_bytes_that_arrive_are_those_of_the_formula(four_ranks, name, layout):
    for size in (2, 4):
        bytes_are_those_of_the_formula(four_ranks, name, layout, size)


def test_bf16_does_not_lose_by_being_spread(four_ranks):
    """Root mean square against fp64 of output and each gradient: at most a tenth more than one device's."""
    for size in (2, 4):
        bf16_is_as_exact(four_ranks, size)


def kept_is_the_same_for_any_number_of_branches(answers, size):
    """Queries and output of 4 heads of 8, keys and values of 2, and 4 log-sum-exps a token."""
    for layout in LAYOUTS:
        assert all(each[size, layout, "kept"] == [64 // size * 100] * 3 for each in answers)


def test_ranks_keep_as_little_for_the_backward_pass(four_ranks):
    for size in (2, 4):
        kept_is_the_same_for_any_number_of_branches(four_ranks, size)


@pytest.mark.slow
def test_eight_ranks_find_what_one_device_finds(tmp_path):
    found = run_ranks(8, all_cases, str(tmp_path / "store"), folder=tmp_path, timeout_s=240.0)
    for name, layout in itertools.product(CASES, LAYOUTS):
        for kind, (_, bound) in DTYPES.items():
            for size in (2, 4, 8):
                assert max(each[size, layout, name, kind][0] for each in found) < bound, (size, layout, name)
        bytes_are_those_of_the_formula(found, name, layout, 8)
    bf16_is_as_exact(found, 8)
    kept_is_the_same_for_any_number_of_branches(found, 8)
