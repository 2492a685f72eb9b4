"""``topology.zero`` and ``topology.fsdp``: what they become, and what they do not go with."""

from __future__ import annotations

import importlib.util

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job.checks import check
from megaplug.job.identity import digest, identity
from megaplug.job.sharding import described
from megaplug.job.translate import megatron_arguments

TORCH = ["topology.fsdp=torch", "topology.zero=3"]
FLAGS = {
    "--use-distributed-optimizer",
    "--dist-ckpt-optim-fully-reshardable",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--torch-fsdp2-no-reshard-after-forward",
}


@pytest.mark.parametrize(
    ("words", "flags", "ckpt_format", "strategy"),
    [
        (["topology.zero=0"], set(), "torch_dist", None),
        (
            ["topology.zero=1"],
            {"--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"},
            "torch_dist",
            None,
        ),
        (
            ["topology.zero=2"],
            {"--use-distributed-optimizer", "--use-megatron-fsdp"},
            "fsdp_dtensor",
            "optim_grads",
        ),
        (
            ["topology.zero=3"],
            {"--use-distributed-optimizer", "--use-megatron-fsdp"},
            "fsdp_dtensor",
            "optim_grads_params",
        ),
        (
            ["topology.zero=2", "topology.fsdp=torch"],
            {"--use-torch-fsdp2", "--torch-fsdp2-no-reshard-after-forward"},
            "torch_dist",
            None,
        ),
        (["topology.zero=3", "topology.fsdp=torch"], {"--use-torch-fsdp2"}, "torch_dist", None),
    ],
)
def test_each_level_is_megatron_s(
    words: list[str], flags: set[str], ckpt_format: str, strategy: str | None
) -> None:
    given = megatron_arguments(*resolved(*words, device="cuda"), FOLDER)
    assert set(given) & FLAGS == flags
    assert given[given.index("--ckpt-format") + 1] == ckpt_format
    if strategy is None:
        assert "--data-parallel-sharding-strategy" not in given
    else:
        assert given[given.index("--data-parallel-sharding-strategy") + 1] == strategy


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (["topology.zero=4"], "topology.zero", "0, 1, 2 or 3"),
        (["topology.zero=1", "topology.fsdp=torch"], "topology.fsdp", "topology.zero is 1"),
        (["topology.zero=3", "topology.fsdp=deepspeed"], "topology.fsdp", "deepspeed"),
        (["topology.zero=3"], "topology.fsdp", "needs a GPU"),
        ([*TORCH, "topology.pp=2"], "topology.pp", "2 ranks"),
        ([*TORCH, "topology.tp=2"], "topology.tp", "2 ranks"),
        ([*TORCH, "moe=small", "topology.ep=2"], "topology.ep", "2 ranks"),
        (
            [*TORCH, "model.untie_embeddings_and_output_weights=false"],
            "model.untie_embeddings_and_output_weights",
            "one weight",
        ),
        ([*TORCH, "precision=fp16"], "precision.fp16", "bf16"),
        (
            [*TORCH, "topology.dp=2", "overlap.overlap_grad_reduce=true"],
            "overlap.overlap_grad_reduce",
            "overlaps by itself",
        ),
        (
            [*TORCH, "megatron.gradient_accumulation_fusion=true"],
            "megatron.gradient_accumulation_fusion",
            "itself",
        ),
        ([*TORCH, "moe=small"], "moe.num_experts", "cannot save experts"),
        ([*TORCH, "topology.dp=3", "train.global_batch_size=24"], "model.hidden_size", "256 rows"),
        ([*TORCH, "topology.dp=3", "train.global_batch_size=24"], "topology.dp", "even number"),
        (
            ["topology.zero=0", "topology.dp=2", "overlap.overlap_param_gather=true"],
            "overlap.overlap_param_gather",
            "topology.zero=0 gathers no parameters",
        ),
        (
            ["topology.zero=0", "optimizer.optimizer_cpu_offload=true"],
            "optimizer.optimizer_cpu_offload",
            "topology.zero=0 is without",
        ),
        (
            [
                "topology.zero=3",
                "megatron.check_weight_hash_across_dp_replicas_interval=5",
            ],
            "megatron.check_weight_hash_across_dp_replicas_interval",
            "whole weights",
        ),
    ],
)
def test_what_does_not_go_together_is_named(words: list[str], key: str, says: str) -> None:
    found = [str(problem) for problem in check(small_job(*words), device="cpu") if problem.key == key]
    assert any(says in text for text in found), found


def test_all_that_fsdp2_excludes_is_told_at_once() -> None:
    job = small_job(*TORCH, "topology.pp=2", "topology.tp=2", "precision=fp16")
    keys = {problem.key for problem in check(job, device="cpu")}
    assert {"topology.pp", "topology.tp", "precision.fp16"} <= keys


def test_megatron_fsdp_is_right_on_a_gpu_where_einops_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    job, real = small_job("topology.zero=3"), importlib.util.find_spec
    found: dict[str, object] = {"einops": object()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name) or real(name))
    assert check(job, device="cuda") == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in found else real(name))
    (problem,) = check(job, device="cuda")
    assert "pip install einops" in problem.hint


def test_the_level_belongs_to_the_identity_of_a_run() -> None:
    digests = {
        digest(identity(*resolved(*words)))
        for words in ([], ["topology.zero=0"], TORCH, [TORCH[0], "topology.zero=2"])
    }
    assert len(digests) == 4


def test_the_header_says_what_is_shared_out() -> None:
    assert described(small_job(*TORCH)) == "ZeRO-3 by torch FSDP2"
    assert described(small_job("topology.zero=2")) == "ZeRO-2 by Megatron-FSDP"
    assert described(small_job("topology.zero=0")) == "nothing shared out (zero=0)"
