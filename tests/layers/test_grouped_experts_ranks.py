"""Checkpoints of experts over ranks: what is saved under one layout is read under another, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.nn import functional as F

HIDDEN, WIDTH, EXPERTS = 16, 12, 4


def gate_and_up(expert: int) -> torch.Tensor:
    """``[2, WIDTH, HIDDEN]`` of one expert of the whole layer; no two elements are alike."""
    return torch.arange(2 * WIDTH * HIDDEN, dtype=torch.float32).view(2, WIDTH, HIDDEN) + 1e4 * expert


def down(expert: int) -> torch.Tensor:
    """``[HIDDEN, WIDTH]`` likewise."""
    return torch.arange(HIDDEN * WIDTH, dtype=torch.float32).view(HIDDEN, WIDTH) - 1e4 * expert - 1


def parts(expert: int, rank: int, size: int) -> list[torch.Tensor]:
    """What a rank of expert tensor parallelism has of both weights."""
    mine = slice(rank * WIDTH // size, (rank + 1) * WIDTH // size)
    return [gate_and_up(expert)[:, mine].flatten(0, 1), down(expert)[:, mine]]


def weights(experts: Any) -> list[list[torch.Tensor]]:
    """Both weights of each of the rank's experts, as views."""
    if hasattr(experts, "local_experts"):
        return [[one.linear_fc1.weight, one.linear_fc2.weight] for one in experts.local_experts]
    both = experts.linear_fc1.weight, experts.linear_fc2.weight
    return [list(pair) for pair in zip(*both, strict=True)]


def build(kind: str, ep: int, etp: int) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaplug.layers.backend import experts_builder
    from megaplug.layers.registry import ExpertsChoice

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        ffn_hidden_size=WIDTH,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        gradient_accumulation_fusion=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    make = experts_builder(ExpertsChoice(kind))
    assert make is not None
    return make(EXPERTS // ep, config, pg_collection=groups, submodules=linears)


def on_ranks(store: str, folder: str, kind: str, ep: int, etp: int, saves: bool) -> float:
    """Save what every expert should have, or load it; the largest difference of any weight of this rank."""
    from megatron.core import dist_checkpointing, parallel_state

    from megaplug.runtime import cpu

    cpu.install()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    experts = build(kind, ep, etp)
    first = parallel_state.get_expert_model_parallel_rank() * EXPERTS // ep
    shard = parallel_state.get_expert_tensor_parallel_rank()
    wanted = [parts(first + number, shard, etp) for number in range(EXPERTS // ep)]
    with torch.no_grad():
        for found, right in zip(weights(experts), wanted, strict=True):
            for weight, value in zip(found, right, strict=True):
                weight.copy_(value if saves else torch.full_like(value, torch.nan))
    state = experts.sharded_state_dict("experts.", metadata={"dp_cp_group": None})
    if saves:
        dist_checkpointing.save(state, folder)
    else:
        loaded = dist_checkpointing.load(state, folder)
        missing = experts.load_state_dict(
            {key.removeprefix("experts."): each for key, each in loaded.items()}
        )
        assert not missing.missing_keys
    pairs = zip(weights(experts), wanted, strict=True)
    return max(
        float((a - b).abs().max()) for found, right in pairs for a, b in zip(found, right, strict=True)
    )


def checked(folder: Path, name: str, checkpoint: Path, kind: str, ep: int, etp: int, *, saves: bool) -> float:
    place = folder / name
    place.mkdir()
    arguments = (str(place / "store"), str(checkpoint), kind, ep, etp, saves)
    return max(run_ranks(ep * etp, on_ranks, *arguments, folder=place))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (
            ("grouped", 4, 1),
            [("grouped", 1, 1), ("grouped", 2, 1), ("sequential", 1, 1), ("sequential", 2, 2)],
        ),
        (("grouped", 2, 2), [("grouped", 1, 1), ("sequential", 4, 1)]),
        (("sequential", 2, 2), [("grouped", 1, 1), ("grouped", 4, 1)]),
    ],
    ids=["EP4", "EP2 ETP2", "SequentialMLP"],
)
def test_weights_are_the_same_under_another_layout(saved, loaded, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    assert checked(tmp_path, "saved", checkpoint, *saved, saves=True) == 0
    for number, layout in enumerate(loaded):
        assert checked(tmp_path, f"loaded{number}", checkpoint, *layout, saves=False) == 0, layout
