"""What a machine has and whether a job fits on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaplug.launchers import machine as room
from megaplug.launchers.machine import Machine, detect_machine, machine_problems

_SMALL = Machine(num_gpus=2, cpu_count=2, memory_total=16 * 10**9, memory_available=8 * 10**9)


def test_this_machine_has_something():
    found = detect_machine()
    assert found.cpu_count >= 1 and 0 < found.memory_available <= found.memory_total


def test_a_job_that_fits_has_no_problem(tmp_path):
    assert machine_problems(_SMALL, 8, 10**8, "cpu", runs_dir=tmp_path / "a" / "b", checkpoint_bytes=1) == []
    assert machine_problems(_SMALL, 2, 0, "cuda") == []


def test_more_ranks_than_gpus():
    (problem,) = machine_problems(_SMALL, 4, 0, "cuda")
    assert problem.key == "topology.world_size"
    assert "4 ranks" in problem.message and "shows 2" in problem.message and "world_size=2" in problem.hint


def test_more_memory_than_there_is():
    (problem,) = machine_problems(_SMALL, 64, 10**9, "cpu")
    assert (
        "64 ranks of 1.7 GB" in problem.message
        and "108.8 GB" in problem.message
        and "8.0 GB" in problem.message
    )
    assert "at most 4" in problem.hint


def test_a_save_beside_training_needs_memory_of_its_own():
    assert machine_problems(_SMALL, 2, 10**9, "cpu", bytes_beside_saving=2 * 10**9) == []
    (problem,) = machine_problems(_SMALL, 4, 10**9, "cpu", bytes_beside_saving=10**9)
    assert "a save beside it 1.0 GB" in problem.message and "need 10.8 GB" in problem.message
    assert "checkpoint.async_save=false" in problem.hint
    (problem,) = machine_problems(_SMALL, 5, 10**9, "cpu", bytes_beside_saving=10**9)
    assert "at most 2" in problem.hint


def test_checkpoints_larger_than_the_disk(tmp_path):
    (problem,) = machine_problems(_SMALL, 1, 0, "cpu", runs_dir=tmp_path / "not_yet", checkpoint_bytes=10**18)
    assert problem.key == "runs_dir" and str(tmp_path) in problem.message


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0,1,2", 3),
        ("1,-1,2", 1),
        ("GPU-ab12", 1),
        ("MIG-x,MIG-y", 2),
        ("none", 0),
    ],
)
def test_cuda_visible_devices(text, number):
    assert room._visible(text) == number


def test_a_container_limit_counts(monkeypatch):
    files = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 1\ninactive_file 300\n"}
    monkeypatch.setattr(room, "_read_cgroup", lambda name: files.get(name, ""))
    found = detect_machine()
    assert (found.memory_total, found.memory_available) == (1000, 400)
    files["cpu.max"] = "100000 100000"
    assert detect_machine().cpu_count == 1


def test_detection_imports_no_torch():
    source = Path(room.__file__).read_text()
    assert "import torch" not in source


def test_the_name_of_a_gpu_is_asked_only_where_there_is_one(monkeypatch):
    monkeypatch.setattr(room, "_num_gpus", lambda: 0)
    monkeypatch.setattr(room.shutil, "which", lambda tool: pytest.fail("nvidia-smi was asked"))
    assert room.gpu_name() is None


def test_the_name_of_a_gpu_is_that_of_the_driver(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'\necho 'NVIDIA H100 80GB HBM3'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(room, "_num_gpus", lambda: 2)
    monkeypatch.setattr(room, "_model_files", lambda: [])
    monkeypatch.setattr(room.shutil, "which", lambda name: str(tool))
    assert room.gpu_name() == "NVIDIA H100 80GB HBM3"
    information = tmp_path / "information"
    information.write_text("Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ:   \t\t 137\n")
    monkeypatch.setattr(room, "_model_files", lambda: [information])
    assert room.gpu_name() == "NVIDIA A100-SXM4-80GB"
