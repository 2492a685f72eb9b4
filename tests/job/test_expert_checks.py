"""What is refused of experts before anything is started, and what becomes of their keys."""

from __future__ import annotations

import pytest
from job_factory import resolved, small_job

from megaplug.job.checks import check, job_shape, resolve_topology
from megaplug.job.experts import are_grouped, experts_choice
from megaplug.job.identity import identity, model_fingerprint
from megaplug.plan.workload import workload_of


def problems(*words: str, device: str | None = None) -> dict[str, str]:
    return {
        problem.key: f"{problem.message} [{problem.hint}]"
        for problem in check(small_job("moe=small", *words), device=device)
    }


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        ("moe.experts=gruoped", "moe.experts", "did you mean 'grouped'"),
        ("moe.experts_params.kernel=fast", "moe.experts_params.kernel", "one of: auto, grouped_mm, loop"),
        ("moe.experts_params.kernle=loop", "moe.experts_params.kernle", "did you mean 'kernel'"),
        ("moe.experts=sequential moe.experts_params.kernel=loop", "moe.experts_params.kernel", "none"),
        ("moe.experts=grouped backend=te", "moe.experts", "have their own experts"),
        ("moe.experts=grouped megatron.moe_latent_size=16", "megatron.moe_latent_size", "sequential"),
        ("moe.layers=[1,5]", "moe.layers", "there is no layer 5"),
        ("moe.layers=[0]", "moe.layers", "numbered from 1 to 4"),
        ("moe.layers=[2,3,2]", "moe.layers", "names layer 2 twice"),
        ("moe.layers=[]", "moe.layers", "names no layer"),
        ("moe.layers=[2] moe.moe_layer_freq=2", "moe.layers", "and so does moe.moe_layer_freq"),
        ("moe.moe_pad_expert_input_to_capacity=true", "moe.moe_pad_expert_input_to_capacity", "filled"),
        ("moe.moe_token_drop_policy=position", "moe.moe_token_drop_policy", "drop no token"),
        ("moe.moe_token_drop_policy=probes", "moe.moe_token_drop_policy", "probs"),
        ("moe.moe_shared_expert_gate=true", "moe.moe_shared_expert_gate", "shared_expert_intermediate_size"),
        (
            "moe.moe_shared_expert_intermediate_size=64 moe.moe_shared_expert_overlap=true "
            "moe.moe_token_dispatcher_type=allgather",
            "moe.moe_shared_expert_overlap",
            "use moe.moe_token_dispatcher_type=alltoall",
        ),
        ("moe.moe_token_dispatcher_type=flex", "moe.moe_token_dispatcher_type", "bf16 only"),
        ("moe.moe_z_loss_coeff=-1", "moe.moe_z_loss_coeff", "-1"),
        ("megatron.moe_apply_probs_on_input=true", "megatron.moe_apply_probs_on_input", "2 experts"),
        ("moe.experts=sequential model.add_bias_linear=true", "moe.experts", "moe.experts=grouped"),
        ("moe.experts=grouped topology.zero=3 topology.dp=2", "topology.zero", "moe.experts=sequential"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_under_its_key(words, key, said):
    found = problems(*words.split())
    assert list(found) == [key]
    assert said in found[key]


def test_what_needs_a_gpu_is_refused_on_a_cpu():
    shared = ("moe.moe_shared_expert_intermediate_size=64", "moe.moe_shared_expert_overlap=true")
    assert "stream of CUDA" in problems(*shared, device="cpu")["moe.moe_shared_expert_overlap"]
    assert problems(*shared) == {}
    flex = ("moe.moe_token_dispatcher_type=flex", "precision=bf16")
    assert "between GPUs" in problems(*flex, device="cpu")["moe.moe_token_dispatcher_type"]
    assert "deep_ep" in problems(*flex, device="cuda")["moe.moe_token_dispatcher_type"]
    padded = ("moe.moe_expert_capacity_factor=1", "moe.moe_pad_expert_input_to_capacity=true")
    assert "DeepEP does not fill" in problems(*flex, *padded)["moe.moe_pad_expert_input_to_capacity"]


def test_a_dense_model_asks_nothing_of_experts():
    assert check(small_job("moe.experts=gruoped")) == []


def test_experts_are_grouped_but_for_those_of_transformer_engine():
    job = small_job("moe=small")
    assert experts_choice(job, "native").name == "grouped"
    assert experts_choice(job, "te").name is None
    assert are_grouped(job, "native") and not are_grouped(job, "te")
    assert are_grouped(small_job("moe=small", "megatron.moe_grouped_gemm=true"), "te")
    assert not are_grouped(small_job("moe=small", "moe.experts=sequential"), "native")


def test_the_activation_of_grouped_experts_can_be_computed_again_and_no_other():
    words = ("train.recompute_granularity=selective", "train.recompute_modules=[moe_act]")
    assert problems(*words) == {}
    assert "there are none" in problems(*words, "moe.experts=sequential")["train.recompute_modules"]


def test_layers_named_by_numbers_are_those_of_megatrons_pattern():
    job, topology, derived, facts = resolved("moe=small", "moe.layers=[2,4]")
    same = resolved("moe=small", "moe.moe_layer_freq=[0,1,0,1]")
    assert job_shape(job).moe_layers == (False, True, False, True) == job_shape(same[0]).moe_layers
    fingerprint = model_fingerprint(job, derived, facts)
    assert fingerprint["moe.moe_layer_freq"] == "[0,1,0,1]"
    assert "layers" not in identity(*resolved("moe=small"))["moe"]
    assert identity(job, topology, derived, facts)["moe"]["layers"] == [2, 4]


def test_the_planner_knows_which_experts_they_are():
    for name, grouped in {"grouped": True, "sequential": False}.items():
        job = small_job("moe=small", f"moe.experts={name}")
        workload = workload_of(job, resolve_topology(job), job_shape(job))
        assert workload.code.grouped_experts is grouped
