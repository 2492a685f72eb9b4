"""FLOPs of every preset as Megatron's own ``num_floating_point_operations`` counts them.

Megatron counts two things more, and they are the tolerance: the weights of the latents' norms in latent
attention (one FLOP pair a channel), and those of the norms beside multi-token prediction.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from job_factory import FOLDER, resolved

from megaplug.job.checks import job_shape
from megaplug.job.compose import ConfigSource, group_options
from megaplug.job.flops import training_flops_per_token
from megaplug.job.translate import megatron_arguments

# One of each kind; all the others are slow tests.
KINDS = ("tiny", "llama3_8b", "gpt3_175b", "nemotron4_340b", "mixtral_8x7b", "deepseek_v3", "gpt_oss_120b")
MODELS = [
    name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
    for name in group_options(ConfigSource())["model"]
]


def of_megatron(
    words: list[str], padded_vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, float]:
    """Megatron's arguments of a job, and its FLOPs a token."""
    from megatron.training.arguments import parse_args
    from megatron.training.training import num_floating_point_operations

    monkeypatch.setattr(sys, "argv", ["megaplug", *words])
    args = parse_args()
    args.padded_vocab_size = padded_vocab_size
    if args.kv_channels is None:  # as validate_args does
        args.kv_channels = args.hidden_size // args.num_attention_heads
    return args, num_floating_point_operations(args, 1) / args.seq_length


@pytest.mark.parametrize("model", MODELS)
def test_every_preset_counts_as_megatrons_log_does(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job, topology, derived, facts = resolved(f"model={model}", "train.micro_batch_size=1")
    words = megatron_arguments(job, topology, derived, facts, FOLDER)
    args, theirs = of_megatron(words, derived.padded_vocab_size, monkeypatch)
    shape = job_shape(job, facts.vocab_size)
    ours = training_flops_per_token(shape, vocab_size=derived.padded_vocab_size, as_megatron=True)
    # By our own count there are half a key a query and the router beside that.
    exactly = training_flops_per_token(shape, vocab_size=derived.padded_vocab_size)
    assert 1 < exactly / ours < 1.01
    if shape.swiglu and not args.swiglu:
        # Megatron counts three matrices of an MLP for --swiglu alone, and two where another function gates.
        ours -= 6 * sum_of_gates(shape)
    assert ours == pytest.approx(theirs, rel=1e-5 if shape.multi_latent_attention else 1e-12)


def sum_of_gates(shape: Any) -> int:
    """Multiply-adds of a token in the gates of all MLPs: one matrix of three."""
    experts = shape.moe_router_topk * shape.expert_ffn_size + (shape.moe_shared_expert_intermediate_size or 0)
    return sum(
        shape.hidden_size * (experts if has_experts else shape.ffn_hidden_size)
        for has_experts in shape.moe_layers
    )


@pytest.mark.parametrize(
    "line",
    [
        "",
        "model=deepseek_v2_lite",
        "moe=small moe.moe_layer_freq='([0]*2+[1]*2)'",
        "moe=small moe.moe_layer_freq='([1]*3+[0]*1)'",
    ],
    ids=["dense", "latent", "experts last", "dense last"],
)
def test_layers_of_multi_token_prediction_count_as_megatron_counts_them(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*line.split(), "megatron.mtp_num_layers=2", "train.micro_batch_size=1"]
    job, topology, derived, facts = resolved(*words)
    words = megatron_arguments(job, topology, derived, facts, FOLDER)
    args, theirs = of_megatron(words, derived.padded_vocab_size, monkeypatch)
    assert args.mtp_num_layers == 2
    shape = job_shape(job, facts.vocab_size)
    ours = training_flops_per_token(
        shape, vocab_size=derived.padded_vocab_size, as_megatron=True, mtp_num_layers=2
    )
    norms = 2 * 6 * 3 * shape.hidden_size
    assert ours + norms == pytest.approx(theirs, rel=1e-5 if shape.multi_latent_attention else 1e-12)
