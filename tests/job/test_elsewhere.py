"""What only this machine lacks is refused at a launch and is a remark of a plan."""

from __future__ import annotations

import importlib.util

import pytest
from job_factory import small_job

from megaplug.job import packages
from megaplug.job.checks import check
from megaplug.job.elsewhere import judge, remarks, te_needed_for

HERE_MISSING = (
    "transformer_engine",
    "flash_attn",
    "triton",
    "apex",
    "einops",
    "wandb",
    "mlflow",
    packages.WEIGHT_GRADIENTS,
)
NEED_TE = [
    ["attention=te"],
    ["precision=fp8"],
    ["topology.tp=2", "overlap.tp_comm_overlap=true", "precision=bf16"],
    ["cuda_graph=te"],
    ["optimizer.use_precision_aware_optimizer=true"],
    ["train.cpu_offloading_num_layers=2"],
    ["train.fine_grained_activation_offloading=true", "train.offload_modules=[core_attn,attn_proj]"],
    ["kernels.te=require"],
]


@pytest.fixture
def installed(monkeypatch):
    """Makes this machine one that has none of `HERE_MISSING` but those named."""
    real = importlib.util.find_spec

    def make(*names: str) -> None:
        def find_spec(name, package=None):
            if name in HERE_MISSING:
                return real("json") if name in names else None
            return real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    make()
    return make


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        (["attention=te"], "transformer_engine"),
        (["attention=te", "topology.cp=2"], "transformer_engine"),
        (["backend=te"], "transformer_engine"),
        (["kernels.te=require"], "transformer_engine"),
        (["kernels.apex=require"], "NVIDIA's Apex"),
        (["megatron.gradient_accumulation_fusion=true"], "NVIDIA's Apex"),
        (["topology.zero=3"], "einops"),
        (["attention=ring", "attention.params.kernel=flash_attn2"], "flash-attn>=2.7"),
        (["attention=dilated", "attention.params.merge=triton"], "triton"),
        (["logging.wandb_project=mine"], "wandb"),
        (["logging.mlflow_tracking_uri=sqlite:///mine.db"], "mlflow"),
    ],
    ids=str,
)
def test_what_this_machine_lacks_is_wrong_here_alone(installed, words, lacks):
    job = small_job("precision=bf16", *words)
    judged = judge(job, "cuda")
    assert judged.problems == []
    assert {problem.lacks for problem in judged.lacking} == {lacks}
    (line,) = remarks(judged.lacking)
    assert line.startswith(f"this machine lacks {lacks}, which ") and "where the job runs" in line
    if words != ["backend=te"]:
        assert lacks in {problem.lacks for problem in check(job, device="cuda")}


@pytest.mark.parametrize("words", NEED_TE, ids=str)
def test_a_job_that_needs_transformer_engine_is_judged_with_it(installed, words):
    job = small_job(*words)
    refused = [problem.key for problem in check(job, device="cuda")]
    assert te_needed_for(job) in refused
    judged = judge(job, "cuda")
    assert (judged.job.backend, judged.problems) == ("te", [])
    installed("transformer_engine")
    assert check(job, device="cuda") == []
    assert judge(job, "cuda").lacking == []


@pytest.mark.parametrize(
    ("words", "device", "key"),
    [
        (["attention=te", "kernels.te=off", "precision=fp8"], "cuda", "precision.fp8_format"),
        (["precision=fp8", "backend=native"], "cuda", "precision.fp8_format"),
        (["precision=fp8"], "cpu", "precision.fp8_format"),
        (["kernels.te=require"], "cpu", "kernels.te"),
        (["backend=te"], "cpu", "backend"),
        (["attention=te"], "cpu", "attention.name"),
        (["megatron.gradient_accumulation_fusion=true", "kernels.apex=off"], "cuda",
         "megatron.gradient_accumulation_fusion"),
        (["topology.tp=3"], "cuda", "topology.tp"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_package_mends_is_wrong_everywhere(installed, words, device, key):
    assert key in [problem.key for problem in judge(small_job(*words), device, suggest=False).problems]


def test_one_line_for_a_package_that_several_keys_need(installed):
    judged = judge(small_job("attention=te", "kernels.te=require"), "cuda")
    assert remarks(judged.lacking) == [
        "this machine lacks transformer_engine, which kernels.te and attention.name need: "
        "install it where the job runs"
    ]
