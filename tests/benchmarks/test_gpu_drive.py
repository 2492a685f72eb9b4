"""The steps of ``benchmarks/gpu.sh``: failures are told, time is kept, nothing is left out in silence."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import drive
from benchmarks.gpu.drive import Step, report, run_all

ROOT = Path(__file__).resolve().parents[2]


def is_running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def step(name: str, code: str, limit_s: float = 30.0) -> Step:
    return Step(name, ("-c", code), limit_s)


def test_a_step_that_fails_is_told_and_stops_no_other(tmp_path, capsys):
    steps = [
        step("good", "print('SKIPPED Transformer Engine: it is not installed')"),
        step("bad", "raise SystemExit('planted')"),
        step("after", "print('still here')"),
    ]
    outcomes = run_all(steps, 60.0, tmp_path / "logs")
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "passed"]
    assert report(outcomes, tmp_path / "gpu.json", "a GPU") == 1
    assert report([outcomes[0], outcomes[2]], tmp_path / "good.json", "a GPU") == 0
    shown = capsys.readouterr().out
    assert "planted" in shown
    assert "good: Transformer Engine: it is not installed" in shown
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["skipped"] == ["good: Transformer Engine: it is not installed"]
    assert [found["exit_code"] for found in stored["steps"]] == [0, 1, 0]


def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid))\n"
        "time.sleep(600)"
    )
    began = time.monotonic()
    (outcome,) = run_all([step("long", code, limit_s=6.0)], 60.0, tmp_path / "logs")
    assert outcome.status == "out of time"
    assert time.monotonic() - began < 30
    while is_running(int(child.read_text())):  # the kill was sent; a busy kernel takes its time over it
        assert time.monotonic() - began < 30


def test_what_no_time_is_left_for_is_not_begun(tmp_path):
    steps = [step("first", "print(1)"), step("second", "raise SystemExit(0)")]
    outcomes = run_all(steps, drive.LEAST_S / 2, tmp_path / "logs")
    assert [outcome.status for outcome in outcomes] == ["not begun", "not begun"]
    assert report(outcomes, tmp_path / "gpu.json", "a GPU") == 1
    assert "first: no time was left" in json.loads((tmp_path / "gpu.json").read_text())["skipped"]


def test_all_steps_are_scripts_and_fit_into_eight_minutes():
    assert drive.BUDGET_S <= 480 - 2 * drive.LEAST_S
    for rehearse in (True, False):
        for found in drive.steps([], "cuda", rehearse):
            assert Path(found.command[0]).is_file(), found.name


def test_without_a_gpu_it_says_so():
    words = [ROOT / "benchmarks" / "gpu.sh"]
    env = os.environ | {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, "no GPU here" in done.stderr) == (2, True)


def rehearsed(results: Path, *words: str) -> dict[str, Any]:
    """The report of a rehearsal whose every step has passed."""
    command = [ROOT / "benchmarks" / "gpu.sh", "--rehearse", "--results", str(results), "--budget", "1700"]
    env = os.environ | {"PYTHON": sys.executable}
    env.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # the tests' own ranks want it, FSDP refuses it
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=env, timeout=1750)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    stored: dict[str, Any] = json.loads((results / "gpu_rehearsal.json").read_text())
    assert {found["status"] for found in stored["steps"]} == {"passed"}
    return stored


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_parity_on_a_gpu_is_rehearsed(tmp_path):
    stored = rehearsed(tmp_path, "--only", "environment,cuda_parity")
    assert [found["name"] for found in stored["steps"]] == ["environment", "cuda_parity"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_rehearsal_runs_every_script_to_its_end(tmp_path):
    stored = rehearsed(tmp_path)
    assert any("Transformer Engine" in line for line in stored["skipped"])
    names = ("environment", "cuda_parity", "attention_kernels", "resume", "parity_cases", "step_time")
    names = (*names, "block_kernels", "longest_sequence", "one_rank_share")
    for name in (*names, "attention", "dilated_attention", "experts", "norm"):
        assert (tmp_path / f"{name}_rehearsal.json").is_file(), name
    assert "rehearsal" in json.loads((tmp_path / "step_time_rehearsal.json").read_text())["machine"]


def test_a_driver_that_is_ended_ends_its_step(tmp_path):
    child, script = tmp_path / "child", tmp_path / "driver.py"
    tells = f"pathlib.Path({str(child)!r}).write_text(str(os.getpid()))"
    step = f"import os, pathlib, time; {tells}; time.sleep(600)"
    script.write_text(
        "import pathlib\n"
        "from benchmarks.gpu import drive\n"
        "drive.leave_on_sigterm()\n"
        f"step = drive.Step('long', ('-c', {step!r}), 60.0)\n"
        f"drive.run_all([step], 60.0, pathlib.Path({str(tmp_path)!r}))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, script], env=env, stdout=subprocess.DEVNULL)
    while not (child.exists() and child.read_text()):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.terminate()
    assert driver.wait(30) == 128 + 15
    deadline = time.monotonic() + 30
    while is_running(int(child.read_text())):
        assert time.monotonic() < deadline


def test_a_step_that_was_skipped_agrees_with_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    jobs = importlib.import_module("jobs")
    lines = [{"loss": 2.0, "grad_norm": 1.0}, {"loss": 2.0, "grad_norm": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = jobs.curve(tmp_path)
    assert jobs.largest_difference(found[:1], [(2.0, 1.25)]) == 0.2
    assert jobs.largest_difference(found, [(2.0, 1.0), (2.0, 1.0)]) == float("inf")
    assert jobs.largest_difference(found[:1], [(2.0, 1.0), (2.0, 1.0)]) == float("inf")
