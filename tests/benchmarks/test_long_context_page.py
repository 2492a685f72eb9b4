"""docs/long_context.md: its tables and pictures are those of the code, and its example runs."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import long_context_page, pattern_picture
from benchmarks.long_context_page import PAGE, ROOT
from megaplug.layers.attention import dilated_attention
from megaplug.layers.attention.pattern import OFFSETS, branches


def test_the_tables_are_those_of_today():
    written = PAGE.read_text()
    assert written == long_context_page.renewed(written), "renew: python benchmarks/long_context_page.py"
    assert written.count("| modelled |\n") == len(long_context_page.ROWS)
    assert "| measured |\n" in written


def test_another_row_is_found(monkeypatch):
    monkeypatch.setattr(long_context_page, "ROWS", long_context_page.ROWS[:-1])
    assert long_context_page.main(["--check"]) == 1


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_example_runs_as_it_stands():
    found: dict = {}
    exec(examples()[0], found)
    q, k, v = (found[name] for name in "qkv")
    assert found["out"].shape == (1, 4096, 8, 64)
    assert torch.equal(found["out"], dilated_attention(q, k, v, [1024, 4096], [1, 4]))
    assert q.grad.any()


def test_the_costs_are_asked_for_as_it_stands():
    found: dict = {}
    for line in examples()[1].splitlines():
        exec(f"last = {line}" if line.startswith(("describe", "Ring")) else line, found)
        if "get_memory_info" in line:
            assert found["last"]["receptive_field"] == 131072
        elif line.startswith("describe"):
            assert found["last"]["largest"] > found["last"]["mean"] > 0
    assert found["last"]["branches_without_communication"] == [8192, 131072]


@pytest.mark.parametrize("offset", OFFSETS)
def test_what_is_drawn_is_what_the_layer_reads(offset):
    """Perturbing a token moves exactly what the picture says reads it."""
    pattern = branches([7, 24], [1, 5])
    drawn = pattern_picture.Drawn(24, 3, pattern, offset)
    assert drawn.rows(pattern[1], 3) == [[3, 8, 13, 18, 23]]
    reads = drawn.reads().any(0)
    q, k, v = torch.randn(3, 1, 24, 3, 4, dtype=torch.float64)
    before = dilated_attention(q, k, v, [7, 24], [1, 5], offset=offset)
    for token in range(24):
        moved = v.clone()
        moved[:, token] += 1.0
        after = dilated_attention(q, k, moved, [7, 24], [1, 5], offset=offset)
        assert np.array_equal((before != after).any(-1)[0].t().numpy(), reads[:, :, token])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tokens 64 --token 640", "--token is 640, and there are 64 tokens"),
        ("--token -1", "--token is -1, and there are 32 tokens"),
        ("--groups 0", "--groups is 0"),
        ("--segments 0 16 32", "segment_lengths has 0"),
        ("--rates 1 2", "3 segment_lengths and 2 dilation_rates"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["pattern_picture.py", *words.split(), f"--picture={tmp_path / 'x.png'}"]
    )
    with pytest.raises(SystemExit, match=f"error: {said}"):
        pattern_picture.main()
    assert not list(tmp_path.iterdir())


def test_no_ranks_are_no_number_of_ranks(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["context_parallel_memory.py", "--ranks", "0"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("context_parallel_memory").main()
    assert ended.value.code == 2
    assert "--ranks 0: give numbers of at least 1" in capsys.readouterr().err


def test_the_picture_has_the_numbers_of_today():
    written = json.loads(pattern_picture.PICTURE.with_suffix(".json").read_text())
    found = pattern_picture.numbers(*pattern_picture.standard())
    assert written == found
    assert found["pairs_in_one_layer"] < found["pairs_in_two_layers"] < found["pairs_of_dense_attention"]
    assert pattern_picture.PICTURE.stat().st_size > 10_000


def test_the_guides_row_sends_nothing_and_a_branch_over_all_does():
    guide, real = list(long_context_page.modelled())[-2:]
    assert "| **0** |" in guide and "| 256K |" in guide
    assert "| **0** |" not in real and "| 1G |" in real


@pytest.mark.slow
def test_memory_and_bytes_of_ranks_are_measured(tmp_path):
    script = ROOT / "benchmarks" / "context_parallel_memory.py"
    words = ["--ranks", "1", "2", "--seq-length", "4096", "--cases", "ring_dilated, contiguous"]
    outputs = ["--json", tmp_path / "found.json", "--picture", tmp_path / "found.png"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, *words, *outputs], check=True, env=env, timeout=250)
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    one, two = (max(row["peak_bytes"]) for row in rows)
    held = 4096 * (4 * 32 + 4 * 8) * 64 * 4  # query, output and gradients of both; keys, values and theirs
    assert held < one < 2 * held
    assert 1.6 < one / two < 2.4
    for row in rows:
        assert max(row["received_bytes"]) == row["described_bytes"]
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_all_results_that_the_page_shows_are_there():
    results = json.loads(long_context_page.MEASURED.read_text())
    assert {row["ranks"] for row in results["results"]} == {1, 2, 4, 8}
    for one, other in itertools.pairwise(results["results"]):
        if other["ranks"] > 1:
            assert max(other["peak_bytes"]) < max(one["peak_bytes"])
    for name in re.findall(r"\]\((pictures/[\w.]+)\)", PAGE.read_text()):
        assert (PAGE.parent / name).is_file()
