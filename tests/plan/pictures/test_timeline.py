"""The timeline draws what the schedule says, and its step is the step-time model's."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from megaplug.plan.cluster import Cluster
from megaplug.plan.pictures.durations import chunk_seconds
from megaplug.plan.pictures.panels import schedule_panels
from megaplug.plan.pictures.timeline import draw_timeline
from megaplug.plan.schedule import simulate
from megaplug.plan.step_time import step_time
from megaplug.plan.workload import Precision, Workload
from megaplug.topology import Batch, ModelShape, Topology

A100 = Cluster("a100", 8, 80e9, {"bf16": 312e12}, 2e12, 300e9, 8, 25e9, constants="a100")
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 8192, 128256)
EXPERTS = replace(LLAMA_8B, num_experts=8, moe_ffn_hidden_size=2048, moe_layer_freq=2)


def workload(pp=4, vpp=None, dp=1, shape=LLAMA_8B, batch=16, **options) -> Workload:
    mesh = Topology(2, pp, vpp, 1, 1, 2, dp, 2 * pp * dp, True, **options)
    return Workload(mesh, shape, Batch(1, batch), precision=Precision.of(bf16=True))


@pytest.mark.parametrize("shape", [LLAMA_8B, EXPERTS])
@pytest.mark.parametrize("load", [{}, {"vpp": 4}, {"pp": 1}, {"pp": 8, "batch": 64}, {"pp": 2, "batch": 3}])
def test_the_schedule_takes_what_the_step_time_model_says(load, shape):
    """The model's closed form of filling and emptying against the passes run one by one."""
    asked = workload(**load, shape=shape)
    forward, backward = chunk_seconds(asked, A100)
    kind = "interleaved" if asked.topology.vpp else "1f1b"
    ran = simulate(kind, forward, backward, asked.num_microbatches)
    modelled = step_time(asked, A100)
    parts = (modelled.compute, modelled.tp, modelled.cp, modelled.ep, modelled.bubble)
    assert ran.makespan == pytest.approx(sum(parts), rel=0.01)


def test_uneven_stages_take_no_longer_than_the_step_time_model_says():
    ends = {"decoder_first_pipeline_num_layers": 7, "decoder_last_pipeline_num_layers": 7}
    asked = workload(4, shape=replace(LLAMA_8B, num_layers=30, vocab_size=1000), batch=32, **ends)
    ran = simulate("1f1b", *chunk_seconds(asked, A100), asked.num_microbatches)
    modelled = step_time(asked, A100)
    closed = modelled.compute + modelled.tp + modelled.bubble
    assert ran.makespan == pytest.approx(closed, rel=0.01)
    assert ran.makespan <= closed * (1 + 1e-9)


def test_passes_in_the_file_never_overlap_and_follow_the_layers(tmp_path):
    png = draw_timeline(schedule_panels(workload(), A100), tmp_path / "t.png", job="a job", cluster="A100")
    schedules = json.loads(png.with_suffix(".json").read_text())["schedules"]
    assert [found["schedule"] for found in schedules] == ["1f1b", "interleaved", "gpipe"]
    for found in schedules:
        passes = [dict(zip(found["columns"], values, strict=True)) for values in found["passes"]]
        chunks = found["chunks"]
        assert len(passes) == 2 * 4 * 16 * chunks
        for stage in range(4):
            own = [one for one in passes if one["stage"] == stage]
            assert all(before["end"] <= after["start"] + 1e-8 for before, after in pairwise(own))
        ends = {(p["stage"], p["chunk"], p["microbatch"], p["pass"]): p["end"] for p in passes}
        for one in passes:
            place = one["chunk"] * 4 + one["stage"] + (-1 if one["pass"] == "forward" else 1)
            if 0 <= place < 4 * chunks:
                chunk, stage = divmod(place, 4)
                assert one["start"] >= ends[stage, chunk, one["microbatch"], one["pass"]] - 1e-8


def test_interleaving_shortens_the_bubble_and_gpipe_keeps_every_microbatch():
    plain, woven, gpipe = schedule_panels(workload(), A100)
    assert woven.chunks == 2
    assert woven.bubble == pytest.approx(plain.bubble / 2, rel=0.01)
    assert gpipe.bubble == pytest.approx(plain.bubble, rel=0.01)
    assert (plain.kept, gpipe.kept) == (4, 16)
    assert woven.kept == (2 * 3 + 4 + 1) / 2
    assert [panel.own for panel in (plain, woven, gpipe)] == [True, False, False]


def test_a_long_step_is_drawn_short_and_its_figures_are_those_of_the_whole():
    asked = workload(batch=200)
    panels = schedule_panels(asked, A100)
    assert [(panel.drawn, panel.microbatches) for panel in panels] == [(32, 200)] * 3
    forward, backward = chunk_seconds(asked, A100)
    for panel in (panels[0], panels[2]):
        whole = simulate(panel.kind, forward, backward, 200)
        assert panel.seconds == pytest.approx(whole.makespan)
        assert panel.bubble == pytest.approx(whole.bubble_of_ideal)
        assert panel.idle == pytest.approx(whole.idle)
        assert panel.kept == whole.in_flight(0)
    assert panels[0].data()["microbatches_drawn"] == 32


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        ({"pp": 1}, "pp is 1"),
        ({"batch": 6}, "groups of pp 4"),
        ({"decoder_first_pipeline_num_layers": 7, "decoder_last_pipeline_num_layers": 9}, "7 layers"),
    ],
)
def test_interleaving_that_cannot_be_says_why(tmp_path, load, reason):
    panels = schedule_panels(workload(**load), A100)
    assert panels[1].timeline is None
    assert reason in panels[1].reason
    png = draw_timeline(panels, tmp_path / "t.png", job="a job", cluster="A100")
    assert reason in json.loads(png.with_suffix(".json").read_text())["schedules"][1]["impossible"]


def test_an_interleaved_job_is_the_middle_panel():
    plain, woven, _ = schedule_panels(workload(vpp=4), A100)
    assert (plain.own, woven.own, woven.chunks) == (False, True, 4)
