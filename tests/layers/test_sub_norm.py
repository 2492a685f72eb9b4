"""MAGNETO's self-attention as Megatron builds it, against the plain torch module and over ranks."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_oracle import error
from ranks import run_ranks

from megaplug.errors import UserError
from megaplug.layers.attention.modules import RingMultiheadDilatedAttention as PlainAttention
from megaplug.layers.attention.rotary import RotarySelfAttention
from megaplug.layers.attention.sub_norm import (
    RingMultiheadDilatedAttention,
    xavier_projections,
)
from megaplug.layers.registry import AttentionLayers
from megaplug.layers.spec import _attention_spec, native_provider, transformer_layer_spec
from megaplug.plan import parameters
from megaplug.topology import ModelShape

PATTERN: dict[str, Any] = {"segment_lengths": [8, 32], "dilation_rates": [1, 2]}
# A mean that is not 0 is what differences of two large sums would lose their digits to.
OFFSET = 3.0
LAYERS = AttentionLayers(("ring_dilated",), {"ring_dilated": PATTERN}, sub_layer_norm=True, gamma_init=2.0)


def make_config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 8,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "normalization": "RMSNorm",
        "use_cpu_initialization": True, "params_dtype": torch.float64, "add_bias_linear": True,
        "gradient_accumulation_fusion": False,
    }  # fmt: skip
    return TransformerConfig(**(values | changes))


def build(config: Any) -> Any:
    """The layer of the config on this rank's groups, its weights drawn from one seed."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import build_module

    torch.manual_seed(3)
    provider = native_provider("ring_dilated", PATTERN, "RMSNorm", config.num_query_groups)
    spec = _attention_spec(config, provider, LAYERS)
    layer = build_module(spec, config=config, layer_number=1)
    assert isinstance(layer, RingMultiheadDilatedAttention)
    assert layer.attn_mask_type == AttnMaskType.causal
    return layer


def whole_norm() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def set_norm(layer: Any, rank: int = 0, size: int = 1) -> None:
    for parameter, value in zip(
        (layer.sub_layernorm.weight, layer.sub_layernorm.bias), whole_norm(), strict=True
    ):
        parameter.data.copy_(value.chunk(size)[rank])


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, grad = (torch.randn(32, 2, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), grad


def run(layer: Any) -> dict[str, torch.Tensor]:
    """The output and every gradient, of one input."""
    x, grad = inputs()
    out, bias = layer(x + OFFSET, None)
    (out + bias).backward(grad)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"out": out + bias, "x": x.grad, **found}


def on_ranks(store: str) -> dict[str, Any]:
    """One rank alone, then two and four that share the layer: for each the results, put together."""
    from megatron.core import parallel_state

    from megaplug.runtime import cpu

    # Megatron gathers the projections of shared groups on a CUDA device.
    cpu.install()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    answers: dict[str, Any] = {}
    for tp in (1, 2, 4):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        group = parallel_state.get_tensor_model_parallel_group()
        for groups in (8, 2):
            layer = build(make_config(num_query_groups=groups, tensor_model_parallel_size=tp))
            set_norm(layer, group.rank(), tp)
            found = run(layer)
            if (tp, groups) == (1, 8):
                answers["plain"] = error_of_plain(layer, found)
            shape = ModelShape(
                2, 64, 128, 8, groups, None, 32, 256, add_bias_linear=True, sub_layer_norm=True
            )
            assert sum(each.numel() for each in layer.parameters()) == parameters._attention(shape, tp)
            sharded = layer.sharded_state_dict(
                metadata={"dp_cp_group": parallel_state.get_data_parallel_group()}
            )
            norm = sharded["sub_layernorm.weight"]
            assert norm.global_shape == (64,)
            assert norm.global_offset == (group.rank() * 64 // tp,)
            answers[tp, groups] = {
                name: gathered(name, value, group) for name, value in found.items() if value is not None
            }
        parallel_state.destroy_model_parallel()
    return answers if rank == 0 else {}


def gathered(name: str, value: torch.Tensor, group: Any) -> torch.Tensor:
    """Of all ranks: rows of the first projection, columns of the last, parts of the norm."""
    if group.size() == 1 or name in ("out", "x", "linear_proj.bias"):
        return value.detach()
    parts = [torch.empty_like(value) for _ in range(group.size())]
    torch.distributed.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, 1 if name == "linear_proj.weight" else 0)


def error_of_plain(layer: Any, found: dict[str, torch.Tensor]) -> float:
    """Of output and gradients, against the plain module with the same weights."""
    plain = PlainAttention(64, 8, *PATTERN.values()).double()
    linears = (plain.q_proj, plain.k_proj, plain.v_proj)

    def split(fused: torch.Tensor) -> list[torch.Tensor]:
        return [part.flatten(0, 1) for part in fused.unflatten(0, (8, 3, 8)).unbind(1)]

    with torch.no_grad():
        for linear, weight, bias in zip(
            linears, split(layer.linear_qkv.weight), split(layer.linear_qkv.bias), strict=True
        ):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        for ours, theirs in ((plain.out_proj, layer.linear_proj), (plain.norm, layer.sub_layernorm)):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
    x, grad = inputs()
    out, _ = plain((x + OFFSET).transpose(0, 1), is_causal=True)
    out.transpose(0, 1).backward(grad)
    pairs = [(found["out"], out.transpose(0, 1)), (found["x"], x.grad)]
    pairs += list(zip(split(found["linear_qkv.weight"]), (each.weight.grad for each in linears), strict=True))
    pairs += [(found["linear_proj.weight"], plain.out_proj.weight.grad)]
    pairs += [(found[f"sub_layernorm.{key}"], getattr(plain.norm, key).grad) for key in ("weight", "bias")]
    return max(error([mine], [theirs]) / max(1.0, theirs.abs().max().item()) for mine, theirs in pairs)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sub_norm")
    return run_ranks(4, on_ranks, str(folder / "store"), folder=folder)[0]


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_that_share_a_layer_find_what_one_finds(answers, tp, groups):
    """Output and all gradients, in fp64; of two groups four ranks hold copies."""
    alone, shared = answers[1, groups], answers[tp, groups]
    assert sorted(alone) == sorted(shared)
    assert "sub_layernorm.weight" in alone
    for name, wanted in alone.items():
        assert error([shared[name]], [wanted]) < 1e-12 * max(1.0, wanted.abs().max().item()), name


def test_the_layer_is_the_plain_module_with_the_same_weights(answers):
    assert answers["plain"] < 1e-12


@pytest.mark.parametrize("shards", [1, 4])
def test_initial_weights_are_xaviers_with_the_gain_where_magneto_has_it(monkeypatch, shards):
    """Of the fused weight's rows, also where a rank's part begins in the middle of a group."""
    from megatron.core import parallel_state

    config = make_config(hidden_size=512, num_attention_heads=16, num_query_groups=2, kv_channels=32)
    build_qkv, build_proj = xavier_projections(*2 * [lambda **options: options["init_method"]], 3.0)
    initialize = build_qkv(config=config, init_method=None)
    torch.manual_seed(0)
    rows, parts = 2 * (8 + 2) * 32, []
    for rank in range(shards):
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        parts.append(initialize(torch.empty(rows // shards, 512)))
    heads = torch.cat(parts).unflatten(0, (2, 10, 32))
    queries, keys = (2 / (512 + 512)) ** 0.5, (2 / (512 + 64)) ** 0.5
    found = [heads[:, place].std().item() for place in range(10)]
    # 32,768 numbers each: their deviation is known to 0.4 %.
    assert found == pytest.approx([queries] * 8 + [keys, 3 * keys], rel=0.02)
    last = build_proj(config=config, init_method=None)(torch.empty(512, 512 // shards))
    assert last.std().item() == pytest.approx(3 * queries, rel=0.02)


def test_without_a_gain_megatrons_initial_weights_stay(config):
    provider = native_provider("flash", {}, "RMSNorm")
    plain = _attention_spec(config(), provider, AttentionLayers.alike("flash", {}))
    assert plain.submodules.linear_qkv is provider.column_parallel_linear()
    assert plain.module is RotarySelfAttention


@pytest.mark.parametrize(("changes", "backend"), [({}, "te"), ({"multi_latent_attention": True}, "native")])
def test_layers_that_have_no_such_norm_refuse_it(changes, backend):
    config = SimpleNamespace(
        multi_latent_attention=False, experimental_attention_variant=None, use_kitchen=False,
        heterogeneous_block_specs=False,
    )  # fmt: skip
    vars(config).update(changes)
    layers = AttentionLayers(("flash",), {}, sub_layer_norm=True)
    with pytest.raises(UserError, match="have no sub_layer_norm"):
        transformer_layer_spec(layers, backend)(config)
