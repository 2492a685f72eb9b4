"""Many ranks against one device: each start of ranks computes all cases, the tests look at single ones."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from dense_oracle import error, tensors, with_grads
from ranks import run_ranks

from megaplug.layers.attention import dilated_attention, ring_attention
from megaplug.layers.attention.exchange import counted_traffic
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
}


def attend(case: Case, inputs: Any, **where: Any) -> Any:
    if case.lengths is None:
        return ring_attention(*inputs, causal=case.causal, **where)
    options = {"causal": case.causal, "offset": case.offset, "mix_grad": case.mix_grad}
    return dilated_attention(*inputs, case.lengths, case.rates, **options, **where)


def part_of(tensor: torch.Tensor, positions: list[int]) -> torch.Tensor:
    return tensor.detach()[:, positions].requires_grad_(tensor.requires_grad)


def one_case(case: Case, dtype: torch.dtype, layout: str, group: Any) -> tuple[float, dict[str, int]]:
    """The largest error of this rank's part, and what it received."""
    inputs, grad = tensors(64, *case.heads, batch=2, dtype=dtype)
    wanted = with_grads(lambda *x: attend(case, x), inputs, grad)
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    mine = TokenLayout(layout, 64, size).positions(rank)
    parts = [part_of(x, mine) for x in inputs]
    with counted_traffic() as traffic:
        found = with_grads(
            lambda *x: attend(case, x, group=group, layout=layout), parts, grad[:, mine].contiguous()
        )
    return error(found, [x[:, mine] for x in wanted]), traffic.received


def all_cases(store: str) -> dict[Any, tuple[float, dict[str, int]]]:
    """On every group of 2, 4, ... ranks that the world has room for."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    for size in [2**i for i in range(1, world.bit_length())]:
        # All ranks make all groups, and each works in its own.
        groups = [torch.distributed.new_group(range(i, i + size)) for i in range(0, world, size)]
        for layout in LAYOUTS:
            found[size, layout, "bf16"] = error_of_bf16(layout, groups[rank // size])
            for name, case in CASES.items():
                for kind, (dtype, _) in DTYPES.items():
                    found[size, layout, name, kind] = one_case(case, dtype, layout, groups[rank // size])
    return found


def error_of_bf16(layout: str, group: Any) -> tuple[float, float]:
    """Squared errors against fp64 of this rank's output and gradients: on the ranks, and on one device."""
    inputs, grad = tensors(256, 4, 2, dim=32, dtype=torch.bfloat16)
    lengths, rates = [64, 256], [1, 2]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_grads(lambda *x: dilated_attention(*x, lengths, rates), wide, grad.double())
    alone = with_grads(lambda *x: dilated_attention(*x, lengths, rates), inputs, grad)
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    mine = TokenLayout(layout, 256, size).positions(rank)
    parts = [part_of(x, mine) for x in inputs]
    where = {"group": group, "layout": layout}
    here = with_grads(lambda *x: dilated_attention(*x, lengths, rates, **where), parts, grad[:, mine])
    wanted = [x[:, mine] for x in exact]
    return tuple(
        sum((a.double() - b).square().sum().item() for a, b in zip(found, wanted, strict=True))
        for found in (here, [x[:, mine] for x in alone])
    )


def bf16_is_as_exact(answers, size):
    for layout in LAYOUTS:
        on_ranks, alone = (sum(each[size, layout, "bf16"][i] for each in answers) for i in (0, 1))
        assert (on_ranks / alone) ** 0.5 <= 1.1, (layout, size)


def formula(case: Case, layout: str, size: int, rank: int, element_size: int) -> int:
    """Bytes of keys and values that arrive, of both sequences of the batch."""
    pattern = branches(case.lengths or (64,), case.rates)
    tokens = TokenLayout(layout, 64, size)
    share = share_of_rank(pattern, tokens, rank, Heads(*case.heads), case.offset, case.causal)
    return 2 * share.elements_received(8) * element_size


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_the_bytes_that_arrive_are_those_of_the_formula(four_ranks, name, layout):
    """Keys and values arrive once forward and once backward; gradients of what was sent come back."""
    for size in (2, 4):
        of_size = [answers[size, layout, name, "fp64"][1] for answers in four_ranks]
        for rank, received in enumerate(of_size):
            wanted = formula(CASES[name], layout, size, rank % size, 8)
            assert received.get("forward", 0) == received.get("keys again", 0) == wanted
        for kind in ("forward", "gradients"):
            assert sum(each.get(kind, 0) for each in of_size) == sum(
                formula(CASES[name], layout, size, rank % size, 8) for rank in range(4)
            )
        if name == "local":
            assert of_size == [{}] * 4


def test_bf16_does_not_lose_by_being_spread(four_ranks):
    """Root mean square against fp64: at most a tenth more than one device's."""
    for size in (2, 4):
        bf16_is_as_exact(four_ranks, size)


@pytest.mark.slow
def test_eight_ranks_find_what_one_device_finds(tmp_path):
    found = run_ranks(8, all_cases, str(tmp_path / "store"), folder=tmp_path, timeout_s=240.0)
    for answers in found:
        for (size, layout, *rest), (worst, _) in answers.items():
            if rest != ["bf16"]:
                assert worst < DTYPES[rest[1]][1], (size, layout, rest)
    bf16_is_as_exact(found, 8)
