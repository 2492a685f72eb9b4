"""Every cell of a heat map says what the rules and the models say of that job."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megaplug.plan.cluster import GIB, Cluster
from megaplug.plan.memory import estimate
from megaplug.plan.pictures.cells import cells_of, short_rule, uneven_ends
from megaplug.plan.pictures.heat_map import draw_heat_map
from megaplug.plan.step_time import step_time
from megaplug.plan.workload import Precision, Workload
from megaplug.topology import Batch, ModelShape, Topology, violations

A100 = Cluster("a100", 8, 40 * GIB, {"bf16": 312e12}, 2e12, 300e9, 8, 25e9, constants="a100")
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 8192, 128256)
EXPERTS = replace(LLAMA_8B, num_layers=24, num_experts=12, moe_ffn_hidden_size=2048)


def workload(shape=LLAMA_8B, tp=2, pp=2, dp=8, ep=1, batch=128, **options) -> Workload:
    mesh = Topology(tp, pp, None, 1, ep, 1 if ep > 1 else tp, dp, tp * pp * dp, tp > 1, **options)
    return Workload(mesh, shape, Batch(1, batch), precision=Precision.of(bf16=True))


def mesh_of(cell, load: Workload, **options) -> Topology:
    """The cell's job built by hand; dp 0 where the GPUs cannot be shared out."""
    world, job = load.topology.world_size, load.topology
    dp = world // (cell.tp * cell.pp) if world % (cell.tp * cell.pp) == 0 else 0
    etp = 1 if job.ep > 1 else cell.tp
    return Topology(cell.tp, cell.pp, None, 1, job.ep, etp, dp, world, cell.tp > 1, **options)


@pytest.mark.parametrize(
    "load",
    [workload(), workload(EXPERTS, ep=4), workload(batch=48), workload(replace(LLAMA_8B, seq_length=96))],
)
def test_a_cell_can_be_exactly_where_no_rule_is_broken(load):
    cells = cells_of(load, A100)
    assert sum(cell.own for cell in cells) == 1
    verdicts = set()
    for cell in cells:
        mesh = mesh_of(cell, load)
        broken = not mesh.dp or bool(violations(mesh, load.shape, load.batch))
        assert bool(cell.problems) == broken
        assert (cell.memory is None) == broken
        assert bool(cell.rule) == broken
        if not broken:
            moved = replace(load, topology=mesh)
            assert cell.memory == estimate(moved).total
            assert cell.seconds == step_time(moved, A100).total
            assert cell.fits == (estimate(moved).total <= A100.usable_memory)
        verdicts.add(broken)
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("load", "place", "rule"),
    [
        (workload(), (32, 4), "128 does not divide 32 GPUs"),
        (
            workload(replace(LLAMA_8B, num_attention_heads=12, num_query_groups=4)),
            (8, 1),
            "8 does not divide 12 heads",
        ),
        (
            workload(replace(LLAMA_8B, num_query_groups=1, num_layers=24)),
            (1, 16),
            "16 does not divide 24 layers",
        ),
        (workload(batch=48), (1, 1), "32 does not divide 48 sequences"),
        (workload(EXPERTS, ep=4), (1, 16), "EP x ETP x PP = 64 does not divide 32 GPUs"),
        (workload(replace(EXPERTS, num_experts=6), ep=4), (1, 1), "4 does not divide 6 experts"),
        (workload(replace(LLAMA_8B, seq_length=100)), (8, 1), "8 does not divide 100 tokens"),
        (workload(replace(LLAMA_8B, num_query_groups=5)), (1, 1), "5 does not divide 32 heads"),
    ],
)
def test_an_impossible_cell_names_its_rule(load, place, rule):
    cell = next(found for found in cells_of(load, A100) if (found.tp, found.pp) == place)
    rules = [short_rule(problem, load, mesh_of(cell, load)) for problem in cell.problems]
    assert rule in rules
    assert cell.rule == rules[0]


def test_uneven_jobs_stay_uneven_with_other_stages():
    shape = replace(LLAMA_8B, num_layers=126)
    ends = {"decoder_first_pipeline_num_layers": 7, "decoder_last_pipeline_num_layers": 7}
    uneven = cells_of(workload(shape, 8, 16, 4, **ends), A100)
    even = cells_of(workload(shape, 8, 14, 4), A100)
    assert {cell.pp for cell in uneven if not cell.problems} == {1, 2, 4, 8, 16, 32}
    assert 16 not in {cell.pp for cell in even if not cell.problems}
    assert uneven_ends(126, 16) == 7
    assert uneven_ends(126, 14) is None


def test_cells_are_drawn_and_written_down(tmp_path):
    load = workload()
    cells = cells_of(load, A100)
    for by in ("time", "memory"):
        png = draw_heat_map(cells, tmp_path / f"{by}.png", job="a job", cluster="A100", num_gpus=32, by=by)
        written = json.loads(png.with_suffix(".json").read_text())["cells"]
        assert [(row["tp"], row["pp"]) for row in written] == [(cell.tp, cell.pp) for cell in cells]
        for row, cell in zip(written, cells, strict=True):
            assert ("rule" in row) == bool(cell.problems)
            assert row.get("fits", False) == cell.fits
        assert png.stat().st_size > 10_000


def test_a_job_for_one_gpu_that_does_not_fit_is_one_cell(tmp_path):
    cells = cells_of(workload(tp=1, pp=1, dp=1), A100)
    assert [(cell.tp, cell.pp, cell.fits) for cell in cells] == [(1, 1, False)]
    draw_heat_map(cells, tmp_path / "one.png", job="a job", cluster="A100", num_gpus=1)
