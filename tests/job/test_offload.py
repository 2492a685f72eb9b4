"""Offload, recomputation and number formats: what is refused before a start, and what is filled in."""

from __future__ import annotations

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job.checks import check
from megaplug.job.translate import megatron_arguments

FINE = ["train.fine_grained_activation_offloading=true", "backend=te"]
OFFLOAD = "optimizer.optimizer_cpu_offload=true"
RECOMPUTE = "train.recompute_modules"


def problems(words: list[str], device: str) -> list[str]:
    return [str(problem) for problem in check(small_job(*words), device=device)]


@pytest.mark.parametrize(
    ("words", "device", "says"),
    [
        ([OFFLOAD], "cpu", "needs a GPU to offload from"),
        (["optimizer.optimizer_offload_fraction=1.5"], "cpu", "between 0 and 1"),
        (["optimizer.overlap_cpu_optimizer_d2h_h2d=true"], "cuda", "optimizer.optimizer_cpu_offload=true"),
        (
            [OFFLOAD, "optimizer.use_precision_aware_optimizer=false"],
            "cuda",
            "set it to true or null",
        ),
        (["optimizer.use_precision_aware_optimizer=true"], "cpu", "Transformer Engine's Adam"),
        (["train.cpu_offloading_num_layers=2"], "cpu", "the backend is native"),
        (["train.cpu_offloading_num_layers=4", "backend=te"], "cuda", "4 of 4 layers"),
        (["train.cpu_offloading_num_layers=1", "backend=te", "topology.pp=2"], "cuda", "2 stages"),
        (
            ["train.cpu_offloading_num_layers=1", "backend=te", f"{RECOMPUTE}=[mlp]"],
            "cuda",
            "nothing to move",
        ),
        (["train.fine_grained_activation_offloading=true"], "cpu", "the backend is native"),
        (FINE, "cuda", "train.offload_modules: is not given"),
        ([*FINE, "train.offload_modules=[attn]"], "cuda", "there is no attn"),
        ([*FINE, "train.offload_modules=[attn_proj]"], "cuda", "add core_attn"),
        ([*FINE, "train.offload_modules=[moe_act]"], "cuda", "the model has none"),
        (["train.offload_modules=[core_attn]"], "cuda", "but nothing is"),
        ([f"{RECOMPUTE}=[moe]"], "cpu", "the model has none"),
        ([f"{RECOMPUTE}=[moe_act]"], "cpu", "grouped experts"),
        ([f"{RECOMPUTE}=[mla_up_proj]"], "cpu", "latent attention only"),
        ([f"{RECOMPUTE}=[shared_experts]", "moe=small"], "cpu", "no shared experts"),
        ([f"{RECOMPUTE}=[mlp]", "train.recompute_granularity=full"], "cpu", "keep one of the two"),
        (["precision.fp16=true", "precision.bf16=true"], "cpu", "bf16 and fp16 cannot both be"),
        (["precision=fp16", "precision.grad_reduce_in_bf16=true"], "cpu", "only with bf16 weights"),
        (["precision.loss_scale=1024"], "cpu", "only fp16 needs a scaled loss"),
        (["precision=fp16", "precision.min_loss_scale=1e9"], "cpu", "above the first scale"),
        (["precision=fp16", "precision.hysteresis=0"], "cpu", "above 0"),
        (["precision=fp8"], "cpu", "the device is cpu"),
        (["precision=fp8", "backend=native"], "cuda", "the backend is native"),
        (["precision.fp8_format=hybrid"], "cuda", "not fp32"),
        (["precision.fp8_format=e5m2"], "cuda", "e5m2"),
        (["precision=fp8", "precision.fp8_recipe=custom"], "cuda", "one of delayed"),
        (["precision.fp8_param_gather=true"], "cuda", "there are no FP8 weights"),
        (["precision=fp8", "model.ffn_hidden_size=680"], "cuda", "not a multiple of 16"),
        (["precision=fp8", f"{RECOMPUTE}=[layernorm]"], "cuda", "the recipe delayed cannot"),
    ],
)
def test_what_cannot_be_is_said_with_what_can(words: list[str], device: str, says: str) -> None:
    found = problems(words, device)
    assert any(says in text for text in found), found


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ([OFFLOAD, "optimizer.optimizer_offload_fraction=0.5"], "cuda"),
        (["train.cpu_offloading_num_layers=2", "backend=te"], "cuda"),
        ([*FINE, "train.offload_modules=[core_attn,attn_proj]"], "cuda"),
        ([f"{RECOMPUTE}=[mlp,core_attn]"], "cpu"),
        ([f"{RECOMPUTE}=[moe]", "moe=small"], "cpu"),
        (["precision=fp16"], "cpu"),
        (["precision=fp16", "precision.loss_scale=1024"], "cpu"),
        (["precision=fp8", "backend=te"], "cuda"),
    ],
)
def test_what_can_be_is_not_refused(words: list[str], device: str) -> None:
    assert problems(words, device) == []


def test_modules_alone_mean_selective_and_full_alone_means_layer_by_layer() -> None:
    selective = megatron_arguments(*resolved(f"{RECOMPUTE}=[mlp,core_attn]"), FOLDER)
    assert selective[selective.index("--recompute-granularity") + 1] == "selective"
    full = megatron_arguments(*resolved("train.recompute_granularity=full"), FOLDER)
    assert full[full.index("--recompute-method") + 1] == "uniform"
    assert full[full.index("--recompute-num-layers") + 1] == "1"


def test_offload_goes_the_precision_aware_optimizer_s_way() -> None:
    assert "--use-precision-aware-optimizer" not in megatron_arguments(*resolved(device="cuda"), FOLDER)
    given = megatron_arguments(*resolved(OFFLOAD, device="cuda"), FOLDER)
    assert "--use-precision-aware-optimizer" in given
