"""Scaling curves: the job is a point of both, and every point is what the models say of that size."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from subprocess import run

import pytest

from megaplug.errors import UserError
from megaplug.job.flops import training_flops_per_token
from megaplug.plan.cluster import GIB, Cluster
from megaplug.plan.pictures import draw_plan_pictures
from megaplug.plan.pictures.growth import sizes_of
from megaplug.plan.pictures.scaling import draw_scaling
from megaplug.plan.step_time import step_time
from megaplug.plan.workload import Precision, Workload
from megaplug.topology import Batch, ModelShape, Topology

A100 = Cluster("a100", 8, 80 * GIB, {"bf16": 312e12}, 2e12, 300e9, 8, 25e9, constants="a100")
SHAPE = ModelShape(32, 4096, 14336, 32, 8, 128, 8192, 128256)


def workload(dp=4, batch=64) -> Workload:
    mesh = Topology(2, 4, None, 1, 1, 2, dp, 8 * dp, True)
    return Workload(mesh, SHAPE, Batch(1, batch), precision=Precision.of(bf16=True))


def test_points_are_what_the_step_time_model_says_of_each_size():
    sizes = sizes_of(workload(), A100)
    assert [size.num_gpus for size in sizes if size.batches == "fixed"] == [8, 16, 32, 64, 128, 256]
    for size in sizes:
        dp = size.num_gpus // 8
        assert size.global_batch_size == (64 if size.batches == "fixed" else 16 * dp)
        moved = workload(dp, size.global_batch_size)
        assert size.seconds == step_time(moved, A100).total
        assert size.tokens_per_second == pytest.approx(moved.tokens_per_step / size.seconds)
        flops = training_flops_per_token(SHAPE, vocab_size=SHAPE.padded_vocab_size(2))
        assert size.mfu == pytest.approx(size.tokens_per_second * flops / (size.num_gpus * 312e12))
        assert size.own == (dp == 4)


def test_a_batch_that_cannot_be_cut_further_ends_the_strong_curve():
    sizes = sizes_of(workload(4, 8), A100)
    assert max(size.num_gpus for size in sizes if size.batches == "fixed") == 64
    assert max(size.num_gpus for size in sizes if size.batches == "growing") == 256


def test_no_more_gpus_than_the_cluster_has():
    sizes = sizes_of(workload(), replace(A100, num_gpus=64))
    assert max(size.num_gpus for size in sizes) == 64


def test_a_job_without_a_size_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no number of GPUs"):
        draw_scaling([], tmp_path / "scaling.png", job="a job", cluster="A100")


def test_all_pictures_of_a_plan_are_drawn_with_their_numbers(tmp_path):
    paths = draw_plan_pictures(workload(), A100, tmp_path / "pictures", "llama3_8b")
    assert [path.name for path in paths] == ["memory.png", "timeline.png", "heat_map.png", "scaling.png"]
    for path in paths:
        assert path.read_bytes()[:4] == b"\x89PNG"
        told = json.loads(path.with_suffix(".json").read_text())
        assert told["picture"] == path.stem
        assert "llama3_8b" in told["job"]
        assert told["label"] == "modelled"
    assert len(list((tmp_path / "pictures").iterdir())) == 8


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        draw_plan_pictures(workload(), A100, tmp_path / "file" / "pictures", "llama3_8b")
    assert "pictures=" in caught.value.hint


def test_matplotlib_is_not_imported_before_a_picture_is_drawn():
    code = "import sys, megaplug.plan.pictures; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    found = run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.split() == ["False", "False"]
