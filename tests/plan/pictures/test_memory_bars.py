"""Stacked bars of memory: they sum to the model's totals, and a full disk is told plainly."""

from __future__ import annotations

import errno
import json
import os
import struct

import pytest

from megaplug.errors import UserError
from megaplug.plan.memory import GIB, stage_memory
from megaplug.plan.pictures import draw_memory
from megaplug.plan.pictures.canvas import DPI
from megaplug.plan.pictures.memory_bars import PARTS, axis_end
from megaplug.plan.workload import Precision, Workload
from megaplug.topology import Batch, ModelShape, Topology

LLAMA_405B = ModelShape(126, 16384, 53248, 128, 8, 128, 8192, 128256)
EXPERTS = ModelShape(8, 256, 688, 8, 2, 32, 256, 256, num_experts=8, moe_ffn_hidden_size=344)


def topology(tp=1, pp=1, ep=1, dp=1, **options) -> Topology:
    world = tp * pp * dp
    return Topology(tp, pp, None, 1, ep, 1 if ep > 1 else tp, dp, world, tp > 1, **options)


UNEVEN = topology(8, 16, dp=64, decoder_first_pipeline_num_layers=7, decoder_last_pipeline_num_layers=7)


def stages_of(mesh, shape, batch=None):
    load = Workload(mesh, shape, batch or Batch(1, 1024), precision=Precision.of(bf16=True))
    return [stage_memory(load, stage) for stage in range(mesh.pp)]


def draw(stages, png, **options):
    told = {"job": "a job", "device": "H100", "memory": 80 * GIB, **options}
    return draw_memory(stages, png, **told)


def png_size(png) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [(UNEVEN, LLAMA_405B), (topology(), EXPERTS), (topology(2, 4, ep=4, dp=4), EXPERTS)],
)
def test_bars_sum_to_what_the_memory_model_says(tmp_path, mesh, shape):
    stages = stages_of(mesh, shape)
    png = draw(stages, tmp_path / "memory.png", layers=mesh.layers_of_stage(shape.num_layers))
    drawn = json.loads(png.with_suffix(".json").read_text())["stages"]
    assert [row["layers"] for row in drawn] == mesh.layers_of_stage(shape.num_layers)
    assert len(drawn) == mesh.pp
    for row, stage in zip(drawn, stages, strict=True):
        assert sum(row[f"{part}_gib"] for part in PARTS) == pytest.approx(stage.total / GIB, rel=1e-9)
        assert row["total_gib"] == pytest.approx(stage.total / GIB, rel=1e-9)


def test_a_stage_beyond_usable_memory_does_not_fit(tmp_path):
    stages = stages_of(UNEVEN, LLAMA_405B)
    limit = sorted(stage.total for stage in stages)[-3]
    png = draw(stages, tmp_path / "memory.png", usable=limit)
    drawn = json.loads(png.with_suffix(".json").read_text())["stages"]
    assert [row["fits"] for row in drawn] == [stage.total <= limit for stage in stages]
    assert sum(not row["fits"] for row in drawn) == 2


@pytest.mark.parametrize("pp", [1, 32])
def test_the_picture_has_the_size_of_its_figure(tmp_path, pp):
    shape = ModelShape(32, 256, 688, 8, 2, 32, 256, 256)
    png = draw(stages_of(topology(pp=pp), shape), tmp_path / "new" / "folder" / "memory.png")
    assert png_size(png) == (9 * DPI, 4.8 * DPI)
    assert png.stat().st_size > 10_000
    assert sorted(path.name for path in png.parent.iterdir()) == ["memory.json", "memory.png"]


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    stages = stages_of(topology(), EXPERTS)
    first, second = (draw(stages, tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert first == second


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_picture(tmp_path, monkeypatch):
    def full(_fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        draw(stages_of(topology(), EXPERTS), tmp_path / "memory.png")
    assert "GB are left" in caught.value.hint
    assert "pictures=" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_told(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot make the folder") as caught:
        draw(stages_of(topology(), EXPERTS), tmp_path / "taken" / "memory.png")
    assert "pictures=" in caught.value.hint


def test_another_ending_than_png_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"memory\.gif"):
        draw(stages_of(topology(), EXPERTS), tmp_path / "memory.gif")


def test_bars_far_below_the_device_are_not_pressed_flat(tmp_path):
    assert axis_end(70, 80) == pytest.approx(1.12 * 80)
    assert axis_end(100, 80) == pytest.approx(1.12 * 100)
    assert axis_end(0.05, 8) == pytest.approx(1.12 * 0.05)
    png = draw(stages_of(topology(), EXPERTS, Batch(1, 1)), tmp_path / "small.png", memory=10_000 * GIB)
    assert json.loads(png.with_suffix(".json").read_text())["device_gib"] == 10_000
