"""Builders for one rank without process groups: what Megatron's modules ask for, and no more."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def config():
    """A function that makes a small TransformerConfig; keywords change it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    def make(**changes: Any) -> Any:
        values: dict[str, Any] = {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "normalization": "RMSNorm",
            "use_cpu_initialization": True,
        }
        return TransformerConfig(**(values | changes))

    return make


@pytest.fixture
def single_rank():
    """A stand-in for a ProcessGroupCollection in which every group is one rank."""
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return SimpleNamespace(tp=group, cp=group, pp=group)


@pytest.fixture
def local_attention(monkeypatch, single_rank):
    """A function that makes Megatron's own attention, which asks CUDA for a device and a seed."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.utils import GlobalMemoryBuffer

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
    monkeypatch.setattr(random.get_cuda_rng_tracker(), "fork", nullcontext)
    # the default causal mask is made with device="cuda"
    monkeypatch.setattr(
        "megatron.core.fusions.fused_softmax.get_default_causal_mask",
        lambda size: torch.ones(size, size, dtype=torch.bool).triu(1),
    )

    def make(config: Any) -> Any:
        return DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=single_rank)

    return make
