from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_flash_is_four_times_faster_and_smaller_than_megatrons_attention_and_as_exact(tmp_path):
    """The benchmark itself, at the default model's heads: 8 for queries, 2 for keys, 32 elements each."""
    report_file = tmp_path / "report.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/attention.py"),
        "--device",
        "cpu",
        "--json",
        str(report_file),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
    assert report["local_over_flash"]["time"] >= 4, done.stdout
    assert report["local_over_flash"]["memory"] >= 4, done.stdout
    assert report["flash_minus_local"] <= 1e-5
    errors = {name: row["error_against_fp64"] for name, row in report["results"].items()}
    assert errors["flash"] <= errors["sdpa"]
