"""Recomputed modules change no number, and as much less is kept from the forward pass as the plan says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
from kept_for_backward import record_what_is_kept
from small_jobs import SmallJobs, curve

from megaplug.job.checks import job_shape, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.plan.activations import stage_activations
from megaplug.plan.workload import Recompute, workload_of

TWO_STEPS = ["train.iters=2", "lr=constant", "lr.lr=1e-3"]
MOE = ["moe=small", "moe.moe_ffn_hidden_size=64"]
SHARED = [*MOE, "moe.moe_shared_expert_intermediate_size=64"]
LOCAL = ["attention=local"]
FULL = ["train.recompute_granularity=full"]
# name: what the model is, what is recomputed, and its modules as the plan counts them (None: not counted).
CASES: dict[str, tuple[list[str], list[str], tuple[str, ...] | None]] = {
    "mlp": ([], ["train.recompute_modules=[mlp]"], ("mlp",)),
    "layernorm": ([], ["train.recompute_modules=[layernorm]"], ("layernorm",)),
    "mlp_layernorm": ([], ["train.recompute_modules=[mlp,layernorm]"], ("mlp", "layernorm")),
    "core_attn": (LOCAL, ["train.recompute_modules=[core_attn]"], None),
    "moe": (MOE, ["train.recompute_modules=[moe]"], ("moe",)),
    "shared_experts": (SHARED, ["train.recompute_modules=[shared_experts]"], ("shared_experts",)),
    "full": ([], FULL, None),
}


@pytest.fixture(scope="module")
def measured(
    small_jobs: SmallJobs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[list[tuple[float, float]], int]]:
    """The curve of a job and the bytes that its forward pass keeps; each job is run once."""
    folder = tmp_path_factory.mktemp("kept")

    @functools.cache
    def run(name: str, *words: str) -> tuple[list[tuple[float, float]], int]:
        file = folder / name
        plant = functools.partial(record_what_is_kept, file)
        found = curve(small_jobs.run([*TWO_STEPS, *words, f"name={name}"], plant=plant))
        return found, int(file.read_text())

    return run


@pytest.mark.parametrize(
    "name",
    [name if name in ("mlp", "full") else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_the_numbers_stay_and_memory_is_freed(
    name: str, small_jobs: SmallJobs, measured: Callable[..., tuple[list[tuple[float, float]], int]]
) -> None:
    """Bit for bit: the same operations on the same numbers, only later."""
    model, recompute, modules = CASES[name]
    plain, all_kept = measured(f"kept_{len(' '.join(model))}", *model)
    found, kept = measured(f"again_{name}", *model, *recompute)
    assert found == plain
    assert kept < all_kept
    if modules is not None:
        job = compose_job(small_jobs.words(model))
        workload = workload_of(job, resolve_topology(job), job_shape(job))
        again = replace(workload, recompute=Recompute("selective", modules=modules))
        modelled = stage_activations(workload, 0).kept - stage_activations(again, 0).kept
        assert all_kept - kept >= 0.99 * modelled
