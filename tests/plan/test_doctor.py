"""The doctor finds what is wrong, says what would cure it, and is not taken down by what is broken."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from megaplug.plan.doctor import can_train, examine, machine, probe, report, software, torch_answers
from megaplug.plan.doctor.finding import Finding

GIB = 1024**3
GPU = {"name": "NVIDIA H200", "total": 140 * GIB, "free": 139 * GIB, "capability": "9.0"}
TORCH_CPU = {
    "version": "2.15.0",
    "cuda_runtime": "13.2",
    "threads": 2,
    "cuda": False,
    "nccl": True,
    "gpus": [],
}
TORCH_GPU = TORCH_CPU | {"cuda": True, "gpus": [GPU]}


def statuses(findings):
    return {finding.name: finding.status for finding in findings}


@pytest.fixture
def a_package(tmp_path, monkeypatch):
    """Makes a package that can be found, with the given files, in front of all others."""

    def make(name, files):
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def test_this_machine_can_train_and_gloo_really_reduced(tmp_path):
    findings = examine(tmp_path / "runs", tmp_path / "cache")
    found = {finding.name: finding for finding in findings}
    assert can_train(findings)
    assert found["gloo"].value == "a group of one rank stands up and reduces"
    assert found["torch"].value.startswith("2.")
    assert found["megatron-core"].value.startswith("0.19")
    assert str(tmp_path / "runs") in found["disk for runs"].value


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 11, 9), "broken"), ((3, 12, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "broken")],
)
def test_python_is_3_12_or_3_13(version, status):
    assert software.python_finding(version, "python3").status == status


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ("megatron-core>=0.19.2,<0.20", "ok"),
        ("megatron-core>=0.20", "broken"),
        ("megatron-core<0.19", "broken"),
        ("megaplug-has-no-such-package>=1", "broken"),
    ],
)
def test_a_package_out_of_range_or_missing_is_broken_and_has_a_cure(wanted, status):
    finding = software.package_finding(Requirement(wanted))
    assert finding.status == status
    assert bool(finding.cure) == (status == "broken")


def test_a_vendors_build_of_torch_is_in_range(monkeypatch):
    monkeypatch.setattr(software.metadata, "version", lambda name: "2.11.0a0+nv26.1")
    assert software.package_finding(Requirement("torch>=2.10")).status == "ok"


def test_what_is_needed_is_what_pyproject_asks_for():
    names = {wanted.name for wanted in software.requirements_of_megaplug()}
    assert {"torch", "megatron-core", "psutil", "hydra-core"} <= names
    assert not {"pytest", "wandb", "apex"} & names


def test_apex_of_nvidia_is_told_from_the_other_project_of_that_name(a_package):
    a_package("apex", {"__init__.py": "raise SystemExit('imported')", "interfaces.py": ""})
    other = software.apex_finding()
    assert (other.status, "not NVIDIA's" in other.value) == ("warning", True)
    assert "uninstall" in other.cure
    a_package("apex", {"optimizers/__init__.py": ""})
    assert software.apex_finding().status == "ok"


@pytest.mark.parametrize(
    ("fault", "status"),
    [("raise OSError('libcuda.so.1')", "broken"), ("raise ImportError('no cudnn')", "warning")],
)
def test_a_broken_transformer_engine_is_found_and_gloo_is_still_asked(a_package, fault, status):
    # Megatron survives an ImportError of it and nothing else.
    a_package("transformer_engine", {"__init__.py": "", "pytorch.py": fault})
    found = {finding.name: finding for finding in torch_answers.torch_findings(probe.ask_torch())}
    assert found["Transformer Engine"].status == status
    assert fault.split("'")[1] in found["Transformer Engine"].value
    assert found["gloo"].status == "ok"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import os\nos._exit(3)", "ended with 3"),
        ("import threading\nthreading.Event().wait()", "no answer within 1 s"),
        ("raise OSError('libcudart.so.13: cannot open')", "libcudart.so.13"),
    ],
    ids=["dies", "hangs", "does not import"],
)
def test_a_torch_that_is_broken_does_not_take_the_doctor_down(a_package, text, says):
    a_package("torch", {"__init__.py": text})
    (finding,) = (
        found
        for found in torch_answers.torch_findings(probe.ask_torch(limit_s=1.0))
        if found.status == "broken"
    )
    assert finding.name in ("torch imports", "gloo")
    assert says in finding.value
    assert finding.cure


def test_a_silent_gloo_is_broken_while_torch_is_still_reported():
    answers = {"torch": TORCH_CPU, "transformer_engine": {"version": None}}
    answers["gloo"] = {"error": "no answer within 120 s", "kind": "Silence"}
    findings = torch_answers.torch_findings(answers)
    assert statuses(findings) == {"CUDA": "absent", "Transformer Engine": "absent", "gloo": "broken"}
    assert "GLOO_SOCKET_IFNAME" in findings[-1].cure


def test_no_gpu_is_no_fault_but_a_driver_that_torch_cannot_use_is(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert statuses(torch_answers.cuda_findings(TORCH_CPU, None)) == {"CUDA": "absent"}
    (unusable,) = torch_answers.cuda_findings(TORCH_CPU, "535.10")
    assert unusable.status == "warning"
    assert "too old for CUDA 13.2" in unusable.cure
    (cpu_build,) = torch_answers.cuda_findings(TORCH_CPU | {"cuda_runtime": None}, "580.65")
    assert "CUDA build" in cpu_build.cure
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (hidden,) = torch_answers.cuda_findings(TORCH_CPU, "580.65")
    assert "CUDA_VISIBLE_DEVICES" in hidden.cure


def test_gpus_are_listed_with_their_memory_and_a_full_one_is_named():
    busy = GPU | {"free": 10 * GIB}
    found = torch_answers.cuda_findings(TORCH_GPU | {"gpus": [GPU, busy]}, "580.65.06")
    assert statuses(found) == {"CUDA": "ok", "GPU 0": "ok", "GPU 1": "warning"}
    assert found[1].value == "NVIDIA H200, 139 of 140 GiB free, compute capability 9.0"
    assert statuses(torch_answers.cuda_findings(TORCH_GPU | {"nccl": False}, "580"))["NCCL"] == "broken"


def test_the_driver_version_is_read_from_its_file(tmp_path):
    file = tmp_path / "version"
    assert torch_answers.driver_version(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC 13.2\n"
    )
    assert torch_answers.driver_version(file) == "580.65.06"


@pytest.mark.parametrize(
    ("available", "status"), [(1 * GIB, "broken"), (3 * GIB, "warning"), (16 * GIB, "ok")]
)
def test_memory_is_judged_by_what_is_free(available, status):
    assert machine.memory_finding(available, 64 * GIB).status == status


def test_a_containers_quota_of_cores_is_seen(tmp_path):
    file = tmp_path / "cpu.max"
    assert machine.cgroup_cores(file) is None
    file.write_text("max 100000\n")
    assert machine.cgroup_cores(file) is None
    file.write_text("250000 100000\n")
    assert machine.cgroup_cores(file) == 2.5
    assert "OMP_NUM_THREADS=2" in machine.cores_finding(64, 64, 2.5).cure
    assert machine.cores_finding(2, 64, None).status == "ok"


@pytest.mark.parametrize(("free", "status"), [(0.1 * GIB, "broken"), (2 * GIB, "warning"), (50 * GIB, "ok")])
def test_a_disk_is_judged_where_the_folder_will_be(tmp_path, monkeypatch, free, status):
    asked = []

    def usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=free, total=100 * GIB)

    monkeypatch.setattr(machine.shutil, "disk_usage", usage)
    finding = machine.disk_finding("disk for runs", tmp_path / "not" / "yet", "runs_dir")
    assert (finding.status, asked) == (status, [tmp_path])
    assert ("runs_dir=" in finding.cure) == (status != "ok")


def test_a_folder_that_cannot_be_written_to_is_broken(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    assert machine.disk_finding("disk", file / "runs", "runs_dir").status == "broken"
    # root may write anywhere, so what the system would answer others is stood in for
    monkeypatch.setattr(machine.os, "access", lambda folder, mode: False)
    assert "cannot be written to" in machine.disk_finding("disk", tmp_path, "runs_dir").value


def test_small_shared_memory_is_a_warning_with_the_containers_option(tmp_path, monkeypatch):
    assert machine.shared_memory_finding(tmp_path / "none").status == "warning"
    small = SimpleNamespace(free=64 * 1024**2, total=64 * 1024**2)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: small)
    assert "--shm-size" in machine.shared_memory_finding(Path("/dev/shm")).cure


FINDINGS = [
    Finding("Python", "3.12.1"),
    Finding("Apex", "not installed", "absent"),
    Finding("gloo", "TimeoutError", "broken", "set GLOO_SOCKET_IFNAME=lo"),
]


def test_the_table_shows_cures_and_the_verdict_without_colours_in_a_pipe():
    stream = io.StringIO()
    report.print_table(FINDINGS, stream)
    text = stream.getvalue()
    assert "\033" not in text
    assert "BROKEN  gloo    TimeoutError\n                cure: set GLOO_SOCKET_IFNAME=lo\n" in text
    assert text.endswith("This machine cannot train until this is mended: gloo.\n")


def test_json_holds_the_same():
    answer = json.loads(report.as_json(FINDINGS))
    assert answer["can_train"] is False
    assert [finding["name"] for finding in answer["findings"]] == ["Python", "Apex", "gloo"]


def test_the_doctor_itself_never_imports_torch():
    assert "megaplug.plan.doctor.probe" in sys.modules
    source = Path(probe.__file__).parent
    assert all("\nimport torch" not in file.read_text() for file in source.glob("*.py"))
