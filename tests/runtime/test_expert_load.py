"""What is counted of a mixture's routers, and what is told of it."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megaplug.runs.expert_map import draw_expert_map, shares_of_experts
from megaplug.runtime.expert_load import STARVED_STEPS, ExpertLoad, Load, Starvation, load_figures


class Router(TopKRouter):
    """A router that answers what it is told."""

    def __init__(self, layer_number: int, topk: int = 1, pads: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.layer_number, self.topk, self.is_mtp_layer = layer_number, topk, False
        self.config: Any = SimpleNamespace(moe_pad_expert_input_to_capacity=pads)

    def forward(self, probs: torch.Tensor, routing_map: torch.Tensor) -> Any:
        return probs, routing_map


def one_hot(experts: list[int], num_experts: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(experts), num_experts).bool()


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)


def test_copies_are_counted_over_microbatches_and_once(one_rank):
    first, other, prediction = Router(1), Router(3), Router(2)
    prediction.is_mtp_layer = True
    load = ExpertLoad(num_layers=3, num_experts=4)
    load.observe([torch.nn.ModuleList([first, other]), torch.nn.ModuleList([prediction])])
    routed = one_hot([0, 0, 1, 3], 4)
    for _ in range(2):
        first(routed.float(), routed)
        prediction(routed.float(), routed)
    with torch.no_grad():  # of a validation, or of a pass whose activations are computed again
        first(routed.float(), routed)
    dropped = routed & one_hot([0, 1, 1, 3], 4)
    other(dropped.float(), dropped)
    assert load.gather() == {1: Load((4, 2, 0, 2), 8), 3: Load((1, 1, 0, 1), 4)}
    assert load.gather() == {}, "what was told is not told again"


def test_what_an_expert_is_filled_up_with_does_not_count(one_rank):
    router, load = Router(1, pads=True), ExpertLoad(1, 2)
    load.observe([router])
    full = torch.ones(4, 2, dtype=torch.bool)
    router(one_hot([0, 0, 0, 1], 2).float(), full)
    assert load.gather() == {1: Load((3, 1), 4)}


def formula(tokens: int, experts: int, factor: float) -> float:
    """Share of tokens that a uniform router loses: of a normal distribution, beyond the capacity."""
    mean = tokens / experts
    deviation = math.sqrt(mean * (1 - 1 / experts))
    z = (math.ceil(mean * factor) - mean) / deviation
    density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return deviation / mean * (density - z * math.erfc(z / math.sqrt(2)) / 2)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1024, 0.0488), (4096, 0.0129), (8192, 0.0054)], ids="{}".format
)
def test_drop_rates_of_a_uniform_router_are_those_of_the_formula(tokens, expected, one_rank):
    """Top 1 of 64 experts with room for 1.1 of an even share. Tolerance 7 %: chance, in 64 batches."""
    assert formula(tokens, 64, 1.1) == pytest.approx(expected, abs=5e-5)
    router, load = megatrons_router(num_moe_experts=64, moe_expert_capacity_factor=1.1), ExpertLoad(1, 64)
    load.observe([router])
    chance = torch.Generator().manual_seed(0)
    for _ in range(64):
        router(torch.randn(tokens, 1, 64, generator=chance))
    measured = load.gather()[1].drop_rate
    assert measured == pytest.approx(expected, rel=0.07)


def megatrons_router(**changes: Any) -> TopKRouter:
    """One that takes its inputs as scores."""
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups: Any = SimpleNamespace(tp=group, cp=group, tp_cp=group, tp_dp_cp=group)
    values: dict[str, Any] = {
        "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "add_bias_linear": False,
        "moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_router_load_balancing_type": "none",
        "use_cpu_initialization": True,
    }  # fmt: skip
    router = TopKRouter(TransformerConfig(**(values | changes)), groups)
    router.set_layer_number(1)
    router.gating = lambda scores: scores  # type: ignore[method-assign]
    return router


def test_balance_is_that_of_ranks_and_entropy_that_of_experts():
    load = Load((3, 1, 2, 2), 10)
    assert load.balance(2) == 1.0
    assert load.balance(4) == pytest.approx(2 / 3)
    assert load.drop_rate == pytest.approx(0.2)
    shares = [3 / 8, 1 / 8, 2 / 8, 2 / 8]
    assert load.entropy == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4))
    assert (Load((5, 0), 5).entropy, Load((5, 5), 10).entropy) == (0.0, 1.0)


def test_figures_are_means_over_layers_and_name_each():
    assert load_figures({}, 2) == {}
    figures = load_figures({2: Load((4, 4), 8), 5: Load((8, 0), 16)}, 2)
    assert figures == {
        "expert_balance": 0.75,
        "expert_drop_rate": 0.25,
        "expert_entropy": 0.5,
        "expert_balance/layer_2": 1.0,
        "expert_balance/layer_5": 0.5,
        "tokens_per_expert": {"2": [4, 4], "5": [8, 0]},
    }


def test_experts_that_starve_are_told_of_once_until_they_are_fed():
    starvation = Starvation()
    hungry, even = {7: Load((60, 60, 3, 60), 183)}, {7: Load((50, 50, 50, 50), 200)}
    told = [starvation.told_of(hungry) for _ in range(STARVED_STEPS + 5)]
    assert [len(lines) for lines in told] == [0] * (STARVED_STEPS - 1) + [1] + [0] * 5
    assert told[STARVED_STEPS - 1][0].startswith("layer 7: expert 2 gets less than a tenth of an even share")
    for _ in range(STARVED_STEPS):
        assert starvation.told_of(even) == []
    assert any(starvation.told_of(hungry) for _ in range(STARVED_STEPS))


def test_a_map_is_drawn_of_the_last_steps_and_only_of_experts(tmp_path):
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "experts.png"
    assert not draw_expert_map(metrics, png, "dense")
    lines = [
        {"iteration": n, "loss": 1.0, **load_figures({2: Load((n, 1), n + 1), 11: Load((1, 3), 4)}, 2)}
        for n in range(1, 30)
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_expert_map(metrics, png, "experts")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    layers, shares = shares_of_experts(lines[:2])
    assert layers == ["2", "11"]
    assert shares == [[pytest.approx(3 / 2.5), pytest.approx(2 / 2.5)], [0.5, 1.5]]
