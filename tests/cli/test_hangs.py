"""A rank that is stopped or loops for ever in a real job: found, named, and nothing is left running."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from live_command import Live, only_run, processes_of
from small_jobs import SMALL, state, write_corpus

from megaplug.runs.folder import RunFolder

pytestmark = pytest.mark.slow

_LAYOUTS = {2: ["topology.dp=2", "train.micro_batch_size=2"], 4: ["topology.tp=2", "topology.pp=2"]}
DECLARATION = """
from megaplug.layers.registry import CORE_ATTENTION, Plugin

plugin = Plugin(name="looping", kind=CORE_ATTENTION, target="looping.layer:Looping", doc="loops at step 3")
"""
LAYER = """
import os, time
import torch

def for_ever():
    while True:
        pass

class Looping(torch.nn.Module):
    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs):
        super().__init__()
        self.calls = 0

    def forward(self, query, key, value, attention_mask, **kwargs):
        self.calls += self.training
        if os.environ["LOOPS"] == os.environ["RANK"] and self.calls == 9:
            for_ever()
        if os.environ["LOOPS"] == "slow":
            # Far longer than watch.hang_s where it may be: in the first step and the first validation.
            began = time.monotonic()
            wait = 12.0 if self.calls == 1 or not self.training else 0.0
            while time.monotonic() < began + wait:
                pass
        return (query + value.repeat_interleave(query.shape[2] // value.shape[2], dim=2)).flatten(2)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    write_corpus(folder / "corpus")
    package, info = folder / "site" / "looping", folder / "site" / "looping-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "declaration.py").write_text(DECLARATION)
    (package / "layer.py").write_text(LAYER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: looping\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megaplug.layers]\nlooping = looping.declaration:plugin\n")
    return folder


def words(place: Path, runs: Path, world_size: int, *more: str) -> list[str]:
    return [
        *SMALL,
        f"data.path={place / 'corpus'}",
        f"data.cache_dir={place / 'cache'}",
        f"runs_dir={runs}",
        "train.iters=400",
        "train.global_batch_size=4",
        "watch.hang_s=10",
        *_LAYOUTS.get(world_size, []),
        *more,
    ]


def assert_found(folder: RunFolder, code: int, rank: int, world_size: int, said: str) -> None:
    found = state(folder)
    assert (code, found.status, found.rank) == (1, "failed", rank), found
    assert found.reason.startswith(f"rank {rank} hangs: training after step ")
    assert said in found.reason
    assert processes_of(folder) == []
    for other in range(world_size):
        if other != rank:
            assert "most recent call first" in folder.stack_file(other).read_text()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_stopped_rank_is_found(place: Path, tmp_path: Path, world_size: int) -> None:
    rank = world_size - 1
    with Live(words(place, tmp_path / "runs", world_size)) as live:
        live.until_step(4)
        os.kill(live.rank_pids()[rank], signal.SIGSTOP)
        code = live.end()
    assert "watch.hang_s" in live.summary["hint"]
    assert_found(only_run(tmp_path / "runs"), code, rank, world_size, "it is stopped")


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_an_endless_loop_is_found(
    place: Path, tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place / "site"), os.environ.get("PYTHONPATH", "")]))
    with Live(words(place, tmp_path / "runs", world_size, "attention.name=looping")) as live:
        code = live.end()
    folder = only_run(tmp_path / "runs")
    assert_found(folder, code, 1, world_size, "it stands in for_ever (")
    assert "in for_ever" in folder.stack_file(1).read_text()


def test_slow_compilation_and_validation_are_left_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPS", "slow")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place / "site"), os.environ.get("PYTHONPATH", "")]))
    more = ["attention.name=looping", "model.num_layers=1", "train.iters=4", "train.micro_batch_size=4"]
    more += ["train.eval_iters=1", "train.eval_interval=2", "watch.first_step_s=120"]
    with Live(words(place, tmp_path / "runs", 1, *more)) as live:
        assert live.end(240.0) == 0, live.summary
