"""The shipped models and topologies: complete, commented, legal."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megaplug.job.schema import ModelConfig, TopologyConfig
from megaplug.topology import Batch, ModelShape, resolve, violations

CONF = Path(__file__).parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
TOPOLOGIES = sorted(path.stem for path in (CONF / "topology").glob("*.yaml"))
ENOUGH = ModelShape(720, 1440, 1440, 144, 144, 10, 720, 1000, num_experts=16)


def load(group: str, name: str, schema: type) -> object:
    merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(CONF / group / f"{name}.yaml"))
    return OmegaConf.to_object(merged)


def test_what_the_issue_names_is_there():
    assert {"tiny", "tiny_llama3_50m", "tiny_llama3_150m", "tiny_moe", "llama1_7b"} <= set(MODELS)
    assert {"llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b", "llama3_405b"} <= set(MODELS)
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
        if line and not line.startswith("#"):
            keys.append(line.split(":")[0])
            assert above.startswith("# "), line
    assert keys == [field.name for field in fields(schema)]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_legal_on_one_rank(name):
    model = load("model", name, ModelConfig)
    assert model.name == name
    known = {field.name for field in fields(ModelShape)}
    values = {key: value for key, value in vars(model).items() if key in known}
    shape = ModelShape(**(values | {"vocab_size": model.vocab_size or 256}))
    topology, problems = resolve(TopologyConfig())
    assert problems + violations(topology, shape, Batch(1, 1)) == []


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_is_legal_for_a_model_that_is_divisible_enough(name):
    request = load("topology", name, TopologyConfig)
    layers = 718 if request.account_for_loss_in_pipeline_split else 720
    shape = ModelShape(**(vars(ENOUGH) | {"num_layers": layers}))
    if request.ep == 1:
        shape = ModelShape(**(vars(shape) | {"num_experts": None}))
    topology, problems = resolve(request)
    assert problems + violations(topology, shape, Batch(1, 8)) == []
    sizes = [f"{key}{getattr(request, key)}" for key in ("tp", "cp", "ep", "pp", "vpp", "dp")]
    assert all(part in [*sizes, "single", "sp", "llama3", "405b"] for part in name.split("_"))


@pytest.mark.parametrize(
    "name", ["llama1_7b", "llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b"]
)
@pytest.mark.parametrize("topology_name", ["tp2_pp2", "tp4_pp2", "tp8_pp4", "tp8_pp8"])
def test_the_llamas_fit_the_usual_topologies(name, topology_name):
    model = load("model", name, ModelConfig)
    known = {field.name for field in fields(ModelShape)}
    shape = ModelShape(**{key: value for key, value in vars(model).items() if key in known})
    topology, problems = resolve(load("topology", topology_name, TopologyConfig))
    assert problems + violations(topology, shape, Batch(1, 8)) == []


def test_llama_405b_has_a_topology_of_its_own():
    model = load("model", "llama3_405b", ModelConfig)
    topology, problems = resolve(load("topology", "tp8_pp16_llama3_405b", TopologyConfig))
    assert problems == []
    assert topology.layers_of_stage(model.num_layers) == [7] + [8] * 14 + [7]
