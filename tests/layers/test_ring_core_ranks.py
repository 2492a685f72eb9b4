"""Megatron's core attention on ranks of tensor and context parallelism together, against one rank."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_oracle import error, with_grads
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from megaplug.layers.attention.megatron_tokens import spread_as
from megaplug.layers.attention.token_layout import LAYOUTS, TokenLayout
from megaplug.layers.backend import core_attention_builder

NUM_TOKENS, NUM_HEADS, NUM_GROUPS, HEAD_DIM = 48, 8, 2, 8
DTYPES = {"fp64": (torch.float64, 1e-12), "fp32": (torch.float32, 5e-6)}
PATTERN = {"segment_lengths": [12, 48], "dilation_rates": [1, 3]}
ATTENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ring": ("ring", {}),
    "by group": ("ring_dilated", PATTERN),
    "by query head": ("ring_dilated", {**PATTERN, "offset": "query_head"}),
    "by block of heads": ("ring_dilated", {**PATTERN, "offset": "torchscale_block"}),
    "detached": ("ring_dilated", {**PATTERN, "mix_grad": "detached"}),
}
# Four ranks of tensor parallelism hold copies of two groups, as Megatron makes them.
SHAPES = {4: ((2, 2), (4, 1)), 8: ((2, 4), (4, 2))}


def attention(name: str, layout: str, groups: Any) -> Any:
    """The core attention as Megatron's layers build it: with as many groups as ranks, if there are fewer."""
    plugin, params = ATTENTIONS[name]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=NUM_HEADS * HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        num_query_groups=max(NUM_GROUPS, groups.tp.size()),
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    build = core_attention_builder(plugin, {**params, "token_layout": layout}, num_query_groups=NUM_GROUPS)
    return build(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def one_rank() -> Any:
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return SimpleNamespace(tp=group, cp=group)


def error_of_rank(name: str, layout: str, dtype: torch.dtype, groups: Any) -> float:
    """Of this rank's tokens and heads; the gradient of a copied group is that of this rank's heads alone."""
    generator = torch.Generator().manual_seed(0)
    counts = (NUM_HEADS, NUM_GROUPS, NUM_GROUPS, NUM_HEADS)
    *inputs, grad = (
        torch.randn(NUM_TOKENS, 2, count, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for count in counts
    )
    tokens = TokenLayout(layout, NUM_TOKENS, groups.cp.size()).positions(groups.cp.rank())
    here = NUM_HEADS // groups.tp.size()
    first = groups.tp.rank() * here
    heads = list(range(first, first + here))
    shared = sorted({head * NUM_GROUPS // NUM_HEADS for head in heads})

    def run(x: list[torch.Tensor], d_out: torch.Tensor, where: Any) -> list[torch.Tensor]:
        core, leaves = attention(name, layout, where), [each.detach().requires_grad_() for each in x]
        return with_grads(lambda *qkv: core(*qkv, None).unflatten(2, (-1, HEAD_DIM)), leaves, d_out)

    masked = torch.zeros_like(grad)
    masked[:, :, heads] = grad[:, :, heads]
    whole = run(inputs, masked, one_rank())
    mine = [x[tokens][:, :, which] for x, which in zip(inputs, (heads, shared, shared), strict=True)]
    found = run(mine, grad[tokens][:, :, heads], groups)
    wanted = [x[tokens][:, :, which] for x, which in zip(whole, (heads, heads, shared, shared), strict=True)]
    return error(found, wanted)


def errors(store: str) -> dict[Any, float]:
    """Every attention, layout and number format, for each shape that the world has."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    for tp, cp in SHAPES[world]:
        # As Megatron numbers them: neighbours are of one tensor-parallel group.
        numbers = torch.arange(world).view(cp, tp)
        across = [torch.distributed.new_group(row.tolist()) for row in numbers]
        along = [torch.distributed.new_group(row.tolist()) for row in numbers.t()]
        groups = SimpleNamespace(tp=across[rank // tp], cp=along[rank % tp])
        for name, layout, kind in itertools.product(ATTENTIONS, LAYOUTS, DTYPES):
            spread_as(layout)
            found[tp, cp, name, layout, kind] = error_of_rank(name, layout, DTYPES[kind][0], groups)
    return found


def check(answers: list[dict[Any, float]]) -> None:
    for key in answers[0]:
        assert max(each[key] for each in answers) < DTYPES[key[-1]][1], key


def test_tensor_and_context_parallel_ranks_find_what_one_rank_finds(tmp_path):
    answers = run_ranks(4, errors, str(tmp_path / "store"), folder=tmp_path)
    assert len(answers[0]) == 2 * len(ATTENTIONS) * 2 * 2
    check(answers)


@pytest.mark.slow
def test_so_do_eight_ranks(tmp_path):
    check(run_ranks(8, errors, str(tmp_path / "store"), folder=tmp_path, timeout_s=240.0))
