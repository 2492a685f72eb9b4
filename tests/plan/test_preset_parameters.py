"""Every shipped model on a spread of topologies: our count of each distinct rank is Megatron's own model's.

The model is built on the meta device with all its layers and sizes, under torch's fake process group.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from test_parameters_against_megatron import no_cuda, real_parameters

from megaplug.job.checks import job_shape
from megaplug.job.compose import compose_job
from megaplug.plan.parameters import stage_parameters, total_parameters
from megaplug.topology import Batch, ModelShape, Topology, layer_ids, violations
from megaplug.topology.stages import layer_problems, uneven_layout

MODELS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
# One of each kind, for the quick suite: dense, biased and tied, latent, experts with and without biases.
QUICK = ("llama3_405b", "gpt3_175b", "deepseek_v3", "qwen3_235b_a22b", "gpt_oss_120b", "nemotron4_340b")
TOPOLOGIES_EACH = 6
# A rank with more experts than this over all its layers takes long to build.
MOST_EXPERTS = 1024

__all__ = ["no_cuda"]


def meshes(shape: ModelShape, count: int, seed: str) -> list[Topology]:
    """Legal topologies of a model, drawn at random; interleaved and uneven ones where it has them."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        tp, pp = draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 3, 4, 8, 9, 16))
        ep, etp = (draw.choice((1, 2, 4, 8, 16, 32, 64)), draw.choice((1, tp))) if shape.is_moe else (1, tp)
        dp = max(1, ep * etp // tp)
        mesh = Topology(tp, pp, None, 1, ep, etp, dp, tp * pp * dp, tp > 1)
        if layer_problems(mesh, shape.num_layers):
            mesh = replace(mesh, **uneven_layout(pp, shape.num_layers))
        elif draw.random() < 0.4:
            mesh = replace(mesh, vpp=draw.choice((2, 3)))
        experts = (shape.num_experts or 0) // ep * -(-shape.num_layers // pp)
        if experts <= MOST_EXPERTS and not violations(mesh, shape, Batch(1, dp * pp)):
            found.append(mesh)
    return found


def distinct_stages(shape: ModelShape, mesh: Topology) -> list[int]:
    """One stage of each kind: with embedding, with output layer, and by its layers' kinds."""
    kinds = {}
    for stage in range(mesh.pp):
        layers = [layer for chunk in layer_ids(mesh, shape.num_layers, stage) for layer in chunk]
        has_experts = tuple(sorted(shape.moe_layers[layer] for layer in layers))
        kinds.setdefault((stage == 0, stage == mesh.pp - 1, has_experts), stage)
    return list(kinds.values())


def compare(name: str, count: int) -> None:
    shape = job_shape(compose_job([f"model={name}"]))
    for mesh in meshes(shape, count, name):
        for stage in distinct_stages(shape, mesh):
            ours = stage_parameters(shape, mesh, stage)
            rank = (stage + 1) * mesh.world_size // mesh.pp - 1
            assert (ours.dense, ours.expert) == real_parameters(shape, mesh, rank), (name, mesh, stage)


@pytest.mark.parametrize("name", QUICK)
def test_a_large_model_has_as_many_parameters_on_every_stage_as_megatron_builds(name: str) -> None:
    compare(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_as_many_parameters_on_every_stage_as_megatron_builds(name: str) -> None:
    compare(name, TOPOLOGIES_EACH)


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_has_its_number_of_parameters_in_megatron(name: str) -> None:
    """On one rank; of a model with experts, each of a layer's on a rank of its own."""
    shape = job_shape(compose_job([f"model={name}"]))
    ep = shape.num_experts or 1
    dense, expert = real_parameters(shape, Topology(1, 1, None, 1, ep, 1, ep, ep), 0)
    assert dense + ep * expert == total_parameters(shape, padded_for_tp=1)
