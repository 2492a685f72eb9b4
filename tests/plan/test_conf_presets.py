"""The shipped models and topologies: complete, commented, legal."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from megaplug.job.checks import check, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.schema import Job, ModelConfig, TopologyConfig
from megaplug.topology import Batch, ModelShape, resolve, violations

CONF = Path(__file__).parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
TOPOLOGIES = sorted(path.stem for path in (CONF / "topology").glob("*.yaml"))
# `auto` has no sizes of its own.
WITH_SIZES = [name for name in TOPOLOGIES if name != "auto"]
ENOUGH = ModelShape(720, 1440, 1440, 144, 144, 10, 720, 1000, num_experts=128)


# A model with experts, a mesh of its own, or neither: what a large model is shipped to run on.
PAIRS = {
    "llama3_405b": "tp8_pp16_llama3_405b",
    "arbor_200b": "tp4_pp8",
    "arbor_400b": "tp8_pp15",
    "arbor_1t_moe": "tp4_pp30_ep128",
    "moe_30b": "tp4_pp4_ep4",
    "mixtral_8x7b": "tp2_ep2",
    "mixtral_8x22b": "tp2_pp4_ep8",
    "deepseek_v2_lite": "ep4",
    "deepseek_v3": "pp8_ep64_deepseek_v3",
    "qwen3_30b_a3b": "tp4_pp4_ep4",
    "qwen3_32b": "tp4_pp4",
    "qwen3_235b_a22b": "tp2_pp8_ep32_qwen3_235b_a22b",
    "kimi_k2": "pp8_ep64_deepseek_v3",
    "gpt_oss_120b": "ep4",
    "gpt3_175b": "tp8_pp8",
    "nemotron4_340b": "tp8_pp8",
}


def job_of(model: str, topology: str = "single", *words: str) -> Job:
    return compose_job([f"model={model}", f"topology={topology}", "train.micro_batch_size=1", *words])


def test_what_the_issue_names_is_there():
    assert {"tiny", "tiny_llama3_50m", "tiny_llama3_150m", "tiny_moe", "llama1_7b"} <= set(MODELS)
    assert {"llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b", "llama3_405b"} <= set(MODELS)
    assert {"llama3_8b_instruct", "llama3_70b_instruct", "code_llama_7b", "mistral_7b"} <= set(MODELS)
    assert {"arbor_200b", "arbor_400b", "arbor_1t_moe", "moe_30b"} <= set(MODELS)
    assert {"llama3_1_8b", "qwen3_8b", "mixtral_8x7b", "deepseek_v3"} <= set(MODELS)
    assert {"single", "tp2", "tp2_pp2", "pp2", "dp2", "tp2_sp", "ep2", "cp2"} <= set(TOPOLOGIES)
    assert {"tp4_pp2", "tp8_pp4", "tp8_pp8", "tp8_pp16"} <= set(TOPOLOGIES)


@pytest.mark.parametrize(
    ("group", "name", "schema"),
    [("model", name, ModelConfig) for name in MODELS]
    + [("topology", name, TopologyConfig) for name in TOPOLOGIES],
)
def test_every_key_is_there_once_with_a_comment_above_it(group, name, schema):
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
    keys = []
    for above, line in pairwise(lines):
        if line and not line.startswith(("#", " ", "defaults:")):
            keys.append(line.split(":")[0])
            assert above.startswith("# "), line
    known = [field.name for field in fields(schema)]
    whole = "defaults:" not in lines
    assert keys == (known if whole else [key for key in known if key in keys])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_legal_on_one_rank(name):
    job = job_of(name)
    assert job.model.name == name
    assert check(job) == []


@pytest.mark.parametrize("name", WITH_SIZES)
def test_every_topology_is_legal_for_a_model_that_is_divisible_enough(name):
    request = job_of("tiny", name).topology
    layers = 718 if request.account_for_loss_in_pipeline_split else 720
    if request.decoder_last_pipeline_num_layers is not None:
        layers = request.decoder_last_pipeline_num_layers + 100 * (request.pp - 1)
    shape = ModelShape(**(vars(ENOUGH) | {"num_layers": layers}))
    if request.ep == 1:
        shape = ModelShape(**(vars(shape) | {"num_experts": None}))
    topology, problems = resolve(request)
    assert problems + violations(topology, shape, Batch(1, 64)) == []
    sizes = [f"{key}{getattr(request, key)}" for key in ("tp", "cp", "ep", "pp", "vpp", "dp")]
    model = next((model for model in MODELS if name.endswith(f"_{model}")), "")
    assert set(name.removesuffix(f"_{model}").split("_")) <= {*sizes, "single", "sp"}


@pytest.mark.parametrize(
    "name", ["llama1_7b", "llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b"]
)
@pytest.mark.parametrize("topology_name", ["tp2_pp2", "tp4_pp2", "tp8_pp4", "tp8_pp8"])
def test_the_llamas_fit_the_usual_topologies(name, topology_name):
    assert check(job_of(name, topology_name)) == []


@pytest.mark.parametrize("name", PAIRS)
def test_every_large_model_has_a_topology_that_fits_it(name):
    assert check(job_of(name, PAIRS[name], "train.global_batch_size=1024")) == []


def test_the_layers_of_large_models_are_dealt_out_as_their_topologies_say():
    stages = {}
    for name in ("llama3_405b", "deepseek_v3"):
        job = job_of(name, PAIRS[name])
        stages[name] = resolve_topology(job).layers_of_stage(job.model.num_layers)
    assert stages == {"llama3_405b": [7] + [8] * 14 + [7], "deepseek_v3": [8] * 7 + [5]}


def test_the_meshes_that_the_seeds_name_for_arbor_are_refused():
    """Twelve key/value heads on eight ranks, 120 layers on 16 stages."""
    assert [problem.key for problem in check(job_of("arbor_200b", "tp8_pp8"))] == ["topology.tp"]
    assert [problem.key for problem in check(job_of("arbor_400b", "tp8_pp16"))] == ["topology.pp"]


@pytest.mark.parametrize("name", ["mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v3", "arbor_1t_moe", "moe_30b"])
def test_a_model_with_experts_brings_them_unless_others_are_typed(name):
    assert job_of(name).moe.num_experts > 4
    assert job_of(name, "single", "moe=small").moe.num_experts == 4
    assert job_of(name, "single", "moe=none").moe.num_experts is None
    assert job_of(name, "single", "moe.num_experts=16").moe.num_experts == 16
    assert job_of(name, "ep2", "experiment=moe_ep2").moe.num_experts == 4


def test_instruct_models_have_the_sizes_of_their_base():
    for name in MODELS:
        if name.endswith("_instruct"):
            ours, base = (vars(job_of(one).model) for one in (name, name.removesuffix("_instruct")))
            assert ours == base | {"name": name}
