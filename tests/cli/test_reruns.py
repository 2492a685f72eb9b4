"""A NaN under Megatron's rerun machine: computed again, attributed, and the run ended or started again.

Each start says that it is on another machine, which is how the rerun machine knows another device.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from live_command import Live, only_run
from small_jobs import SMALL, state, steps, write_corpus

from megaplug.runs.checkpoints import list_checkpoints
from megaplug.runs.history import read_events

pytestmark = pytest.mark.slow

DECLARATION = """
from megaplug.layers.registry import CORE_ATTENTION, Plugin

plugin = Plugin(name="faulty", kind=CORE_ATTENTION, target="faulty.layer:Faulty", doc="NaN at step 4")
"""
LAYER = """
import os
from pathlib import Path

import torch

fault, rank, real = os.environ["FAULT"], os.environ["RANK"], os.uname()
starts = Path(os.environ["PLACE"]) / f"starts{rank}"
turn = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (turn + 1))
os.uname = lambda: os.uname_result((real.sysname, f"machine{turn}", *real[2:]))
calls = [0]

class Faulty(torch.nn.Module):
    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs):
        super().__init__()

    def forward(self, query, key, value, attention_mask, **kwargs):
        from megatron.training import get_args
        if get_args().curr_iteration == 3 and rank == os.environ["FAULTY_RANK"] and self.training:
            calls[0] += 1
            if turn == 0 and (fault == "device" or calls[0] == 1):
                query = query * float("nan")
        return (query + value.repeat_interleave(query.shape[2] // value.shape[2], dim=2)).flatten(2)
"""
WORDS = [
    *SMALL,
    "attention.name=faulty",
    "model.num_layers=1",
    "train.micro_batch_size=4",
    "train.iters=5",
    "lr=constant",
    "checkpoint.save_interval=2",
    "resilience.rerun_mode=validate_results",
    "watch.max_restarts=3",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reruns")
    write_corpus(folder / "corpus")
    package, info = folder / "site" / "faulty", folder / "site" / "faulty-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "declaration.py").write_text(DECLARATION)
    (package / "layer.py").write_text(LAYER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megaplug.layers]\nfaulty = faulty.declaration:plugin\n")
    return folder


@pytest.fixture
def words(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    path = os.pathsep.join([str(site / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PLACE", str(tmp_path))
    places = [f"data.path={site / 'corpus'}", f"data.cache_dir={site / 'cache'}"]
    return [*WORDS, *places, f"runs_dir={tmp_path / 'runs'}"]


def test_a_device_that_computes_wrongly_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same NaN again: saved with its batch (16), computed on another device, which knows better (17)."""
    monkeypatch.setenv("FAULT", "device")
    monkeypatch.setenv("FAULTY_RANK", "1")
    with Live([*words, "topology.dp=2"]) as live:
        assert live.end(240.0) == 1
    folder = only_run(tmp_path / "runs")
    (restart,) = live.of("restart")
    assert (restart["kind"], restart["rank"], restart["from_iteration"]) == ("unexplained", 1, 3)
    assert restart["reason"].startswith(
        "rank 1 failed: NaN in the loss at step 4: computed again it was the same"
    )
    found = state(folder)
    assert (found.status, found.rank, found.num_restarts) == ("failed", 1, 1)
    assert found.reason.startswith("rank 1 failed: NaN in the loss at step 4: on this device it is ")
    assert found.reason.endswith("device cpu of machine0 computes wrongly")
    # What is saved holds no NaN: the step was never taken.
    assert [found.iteration for found in list_checkpoints(folder.checkpoints)] == [2, 3]
    assert [line["iteration"] for line in steps(folder)] == [1, 2, 3]
    assert [event["event"] for event in read_events(folder.events_file)] == [
        "start",
        "failure",
        "restart",
        "failure",
        "end",
    ]


def test_a_passing_fault_is_one_restart(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "passing")
    monkeypatch.setenv("FAULTY_RANK", "0")
    with Live(words) as live:
        assert live.end(240.0) == 0, live.stderr()
    folder = only_run(tmp_path / "runs")
    (restart,) = live.of("restart")
    assert (restart["kind"], restart["from_iteration"]) == ("transient", 2)
    assert "a passing fault of device cpu of machine0" in restart["reason"]
    found = state(folder)
    assert (found.status, found.iteration, found.num_restarts) == ("finished", 5, 1)
    assert [line["iteration"] for line in steps(folder)] == [1, 2, 3, 4, 5]
    assert all(line["loss"] is not None for line in steps(folder))
