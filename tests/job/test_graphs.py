"""CUDA graphs: what they cannot be combined with is refused by name, and the rest reaches Megatron."""

from __future__ import annotations

import sys

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job.checks import check
from megaplug.job.translate import megatron_arguments

LOCAL = "cuda_graph=local"
FULL = "train.recompute_granularity=full train.recompute_method=uniform train.recompute_num_layers=1"
SELECTIVE = "train.recompute_granularity=selective train.recompute_modules=[mlp]"
MOVED = "backend=te train.fine_grained_activation_offloading=true train.offload_modules"
PARTS = "cuda_graph.cuda_graph_modules"


def problems(line: str, device: str = "cuda") -> str:
    return "\n".join(map(str, check(small_job(*line.split()), device=device)))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{PARTS}=[attn]", "nothing is captured"),
        (f"{LOCAL} {PARTS}=[attention]", "there is no attention"),
        (f"{LOCAL} {PARTS}=[moe]", "moe without experts"),
        (f"{LOCAL} moe=small", "a graph cannot ask how many"),
        (f"{LOCAL} moe=small {PARTS}=[moe_preprocess]", "goes with moe_router only"),
        ("cuda_graph=te backend=native", "captures only its own layers"),
        (f"cuda_graph=full_iteration {PARTS}=[attn]", "leave the list empty"),
        (f"{LOCAL} cuda_graph.cuda_graph_warmup_steps=-1", "must not be negative"),
        (
            f"{LOCAL} {FULL}",
            "full recomputation goes with full_iteration only",
        ),
        (
            f"{LOCAL} {SELECTIVE} model.hidden_dropout=0.1",
            "would draw other numbers",
        ),
        (
            f"{LOCAL} train.recompute_modules=[mlp] model.hidden_dropout=0.1",
            "would draw other numbers",
        ),
        (
            f"{LOCAL} attention=local train.recompute_granularity=selective model.attention_dropout=0.1",
            "core_attn is captured and recomputed",
        ),
        (f"{LOCAL} moe=small train.recompute_modules=[moe] model.hidden_dropout=0.1", "moe is captured and"),
        (f"{LOCAL} train.cpu_offloading_num_layers=1", "moved to the CPU cannot be captured"),
        (f"{LOCAL} {MOVED}=[core_attn]", "core_attn cannot be moved to the CPU"),
        (f"{LOCAL} moe=small {MOVED}=[expert_fc1]", "experts that are captured whole cannot be moved"),
        (f"cuda_graph=te {MOVED}=[core_attn] cuda_graph.cuda_graph_warmup_steps=0", "before the capture"),
        (f"cuda_graph=full_iteration {MOVED}=[core_attn]", "how many moves to the CPU may be under way"),
        (f"{LOCAL} megatron.cuda_graph_scope_deprecated=[attn]", "use cuda_graph.cuda_graph_modules"),
    ],
)
def test_what_cannot_be_captured_is_refused(line, says):
    assert says in problems(line)


@pytest.mark.parametrize("impl", ["local", "full_iteration"])
def test_a_cpu_has_no_graphs(impl):
    assert "need a GPU" in problems(f"cuda_graph={impl}", device="cpu")
    assert problems(f"cuda_graph={impl}") == ""


@pytest.mark.parametrize(
    "line",
    [
        f"{LOCAL} {PARTS}=[attn,mlp]",
        f"{LOCAL} moe=small {PARTS}=[attn,moe_router]",
        f"cuda_graph=full_iteration {FULL}",
        f"{LOCAL} {PARTS}=[attn,moe_router] moe=small {MOVED}=[expert_fc1]",
        f"cuda_graph=te {MOVED}=[core_attn]",
    ],
)
def test_what_can_be_captured_is_not_refused(line):
    assert problems(line) == ""


def test_megatron_reads_what_is_to_be_captured(monkeypatch):
    from megatron.training.arguments import parse_args

    def parsed(*words: str):
        monkeypatch.setattr(
            sys, "argv", ["megaplug", *megatron_arguments(*resolved(*words, device="cuda"), FOLDER)]
        )
        return parse_args()

    args = parsed(LOCAL, f"{PARTS}=[attn,mlp]", "cuda_graph.cuda_graph_warmup_steps=2")
    assert (args.cuda_graph_impl, args.cuda_graph_warmup_steps) == ("local", 2)
    assert [getattr(part, "name", part) for part in args.cuda_graph_modules] == ["attn", "mlp"]
    assert args.check_for_nan_in_loss_and_grad
    assert not parsed("cuda_graph=full_iteration").check_for_nan_in_loss_and_grad
