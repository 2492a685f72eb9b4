"""The weights of a Hugging Face decoder under the names and in the layouts of Megatron's ``GPTModel``.

For tests only: it knows the architectures whose logits are compared, and takes whole models on one rank.
Layouts: ``linear_qkv`` holds, group after group, the group's query heads, its key and its value;
``linear_fc1`` holds the gate's rows before the up-projection's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Layout = Callable[..., Tensor]


def gate_then_up(gate: Tensor, up: Tensor) -> Tensor:
    """``[2 ffn, hidden]``, as ``chunk(2)`` in the SwiGLU takes it apart."""
    return torch.cat([gate, up])


def group_by_group(q: Tensor, k: Tensor, v: Tensor, config: Any) -> Tensor:
    """``[(heads + 2 groups) * head_dim, hidden]``, group after group; also of biases."""
    groups = config.num_key_value_heads
    parts = [weight.unflatten(0, (groups, -1)) for weight in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def to_megatron(
    theirs: Mapping[str, Tensor],
    config: Any,
    *,
    fc1: Layout = gate_then_up,
    qkv: Layout = group_by_group,
    grouped: bool = True,
) -> dict[str, Tensor]:
    """Rename and lay out every weight.

    Args:
        theirs: ``state_dict()`` of a Hugging Face causal language model.
        config: Its configuration.
        fc1: How gate and up-projection become one weight; another one is a fault to plant.
        qkv: How queries, keys and values become one weight; likewise.
        grouped: Whether the model's experts are one parameter, or one after the other.
    """
    left = dict(theirs)
    ours = {"embedding.word_embeddings.weight": left.pop("model.embed_tokens.weight")}
    head = left.pop("lm_head.weight")
    if not config.tie_word_embeddings:
        ours["output_layer.weight"] = head
    ours["decoder.final_layernorm.weight"] = left.pop("model.norm.weight")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
        layer_weights = {**_norms(own), **_attention(own, config, qkv), **_mlp(own, fc1, grouped)}
        assert not own, f"not copied: {sorted(own)}"
        ours |= {f"decoder.layers.{layer}.{name}": weight for name, weight in layer_weights.items()}
    assert not left, f"not copied: {sorted(left)}"
    return ours


def _norms(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "input_layernorm.weight": own.pop("input_layernorm.weight"),
        "pre_mlp_layernorm.weight": own.pop("post_attention_layernorm.weight"),
    }


# Latent attention: the linear layers of Hugging Face's modules with Megatron's names for them.
_LATENT = {
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
    "o_proj": "linear_proj",
}


def _attention(own: dict[str, Tensor], config: Any, qkv: Layout) -> dict[str, Tensor]:
    if "self_attn.kv_b_proj.weight" in own:
        names = {theirs: name for theirs, name in _LATENT.items() if f"self_attn.{theirs}.weight" in own}
        return {
            f"self_attention.{name}.weight": own.pop(f"self_attn.{theirs}.weight")
            for theirs, name in names.items()
        }
    q, k, v, out = (own.pop(f"self_attn.{name}_proj.weight") for name in "qkvo")
    weights = {
        "self_attention.linear_qkv.weight": qkv(q, k, v, config),
        "self_attention.linear_proj.weight": out,
    }
    if "self_attn.q_proj.bias" in own:
        biases = (own.pop(f"self_attn.{name}_proj.bias") for name in "qkv")
        weights["self_attention.linear_qkv.bias"] = qkv(*biases, config)
    for name in "qk":
        if f"self_attn.{name}_norm.weight" in own:
            weights[f"self_attention.{name}_layernorm.weight"] = own.pop(f"self_attn.{name}_norm.weight")
    return weights


def _mlp(own: dict[str, Tensor], fc1: Layout, grouped: bool) -> dict[str, Tensor]:
    if "mlp.gate.weight" not in own:
        return _one_mlp(own, "mlp.", fc1)
    weights = {"mlp.router.weight": own.pop("mlp.gate.weight")}
    gate_up, down = own.pop("mlp.experts.gate_up_proj"), own.pop("mlp.experts.down_proj")
    first = [fc1(*both.chunk(2)) for both in gate_up]
    if grouped:
        weights |= {
            "mlp.experts.linear_fc1.weight": torch.stack(first),
            "mlp.experts.linear_fc2.weight": down,
        }
    else:
        for expert, (both, last) in enumerate(zip(first, down, strict=True)):
            prefix = f"mlp.experts.local_experts.{expert}."
            weights |= {f"{prefix}linear_fc1.weight": both, f"{prefix}linear_fc2.weight": last}
    if "mlp.gate.e_score_correction_bias" in own:
        weights["mlp.router.expert_bias"] = own.pop("mlp.gate.e_score_correction_bias")
    if "mlp.shared_experts.down_proj.weight" in own:
        weights |= _one_mlp(own, "mlp.shared_experts.", fc1)
    if "mlp.shared_expert_gate.weight" in own:
        shared = _one_mlp(own, "mlp.shared_expert.", fc1)
        weights |= {
            name.replace("shared_expert.", "shared_experts."): value for name, value in shared.items()
        }
        weights["mlp.shared_experts.gate_weight"] = own.pop("mlp.shared_expert_gate.weight")
    return weights


def _one_mlp(own: dict[str, Tensor], prefix: str, fc1: Layout) -> dict[str, Tensor]:
    gate, up, down = (own.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
    return {f"{prefix}linear_fc1.weight": fc1(gate, up), f"{prefix}linear_fc2.weight": down}
