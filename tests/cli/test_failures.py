"""What a person reads when a rank runs out of memory, is killed, computes NaN, or cannot read its data."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from live_command import only_run, train
from small_jobs import SMALL, state, write_corpus

from megaplug.commands.advice import size_text
from megaplug.runs.folder import RunFolder

pytestmark = pytest.mark.slow

DECLARATION = """
from megaplug.layers.registry import CORE_ATTENTION, Plugin

plugin = Plugin(name="saboteur", kind=CORE_ATTENTION, target="sabotage.layer:Saboteur", doc="fails at step 3")
"""

# One micro-batch of four a step, and one layer: the third call is the third step. Rank 1 fails.
LAYER = """
import os, resource, signal
import psutil
import torch

fault, rank = os.environ["FAULT"], os.environ["RANK"]
if fault == "data" and rank == "1":
    from megatron.core.datasets.gpt_dataset import GPTDataset
    real, calls = GPTDataset.__getitem__, []
    def getitem(self, index):
        calls.append(index)
        if len(calls) == 2 * 4 + 1:
            raise OSError(5, "Input/output error")
        return real(self, index)
    GPTDataset.__getitem__ = getitem

class Saboteur(torch.nn.Module):
    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs):
        super().__init__()
        self.step = 0

    def forward(self, query, key, value, attention_mask, **kwargs):
        self.step += 1
        if self.step == 3 and rank == "1":
            if fault == "memory":
                used = psutil.Process().memory_info().vms
                resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
                torch.empty(64 << 20, dtype=torch.uint8)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "nan":
                query = query * float("nan")
        return (query + value.repeat_interleave(query.shape[2] // value.shape[2], dim=2)).flatten(2)
"""

WORDS = [
    "attention.name=saboteur",
    "model.num_layers=1",
    "topology.dp=2",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.iters=5",
    "lr=constant",
    "checkpoint.save_interval=2",
    # Rank 1 fails in the next step, and what is to be saved by then is.
    "checkpoint.async_save=false",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    write_corpus(folder / "corpus")
    package, info = folder / "site" / "sabotage", folder / "site" / "sabotage-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "declaration.py").write_text(DECLARATION)
    (package / "layer.py").write_text(LAYER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sabotage\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megaplug.layers]\nsaboteur = sabotage.declaration:plugin\n")
    return folder


def fail(place: Path, fault: str, *words: str) -> tuple[subprocess.CompletedProcess[str], RunFolder]:
    runs = place / fault
    paths = [f"data.path={place / 'corpus'}", f"data.cache_dir={place / 'cache'}", f"runs_dir={runs}"]
    path = os.pathsep.join([str(place / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = train(*SMALL, *paths, *WORDS, *words, env={"PYTHONPATH": path, "FAULT": fault}, timeout_s=300.0)
    assert done.returncode == 1, done.stdout + done.stderr
    found = state(folder := only_run(runs))
    assert (found.status, found.rank, found.iteration, found.saved_iteration) == ("failed", 1, 2, 2)
    assert found.reason in done.stdout
    assert "1 of 2: pipeline stage 0 of 1, dp 1 of 2" in done.stdout
    assert f"step 2 in {folder.checkpoints / 'iter_0000002'}" in done.stdout
    assert "goes on from step 2" in done.stdout
    assert "Warning" not in done.stderr
    return done, folder


def value(text: str, label: str) -> str:
    """The value that stands beside a label of the summary; the header may have the same label."""
    *_, line = [line for line in text.splitlines() if line.startswith(f"  {label} ")]
    return line.removeprefix(f"  {label} ").strip()


def test_out_of_memory_says_who_and_what_would_fit(place: Path) -> None:
    done, folder = fail(place, "memory", "model.seq_length=512")
    assert state(folder).reason == "rank 1 failed: out of memory at step 3, allocating 64 MiB"
    memory = value(done.stdout, "memory")
    assert "planned " in memory and "GiB (measured" in memory
    lines = done.stdout.splitlines()
    # Which of them would fit follows from the peak that was measured.
    labels = ("  should fit ", "  needs less ")
    advised = [line.split(maxsplit=2)[2] for line in lines if line.startswith(labels)]
    assert advised[0].startswith("train.micro_batch_size=")
    # Each of them is a job that can be started, and needs less.
    planned = plan(place, "model.seq_length=512")
    assert len(advised) == 3
    for words in advised:
        change, _, needs = words.partition(" (")
        needed = plan(place, "model.seq_length=512", *change.split())
        assert needed < planned
        assert needs.startswith(size_text(needed))
        assert ("all 2 ranks" in needs) == ("topology.dp=1" not in change)


def plan(place: Path, *words: str) -> int:
    """Modelled bytes of all ranks, of a job that has passed its checks."""
    shown = [*SMALL, f"data.path={place / 'corpus'}", f"data.cache_dir={place / 'cache'}", *WORDS[1:]]
    done = train(*shown, *words, "launch=print", "launch.output=json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return said["memory_bytes_per_rank_modelled"] * said["topology"]["world_size"]


def test_a_killed_rank_names_its_last_memory(place: Path) -> None:
    done, folder = fail(place, "killed")
    killed = "rank 1 was killed by signal 9 (SIGKILL), probably by the kernel's out-of-memory killer"
    assert state(folder).reason == killed
    assert "GiB (measured, when it was last heard of)" in value(done.stdout, "memory")
    # That memory was the cause is likely and not known.
    assert "  needs less  " in done.stdout
    assert "should fit" not in done.stdout


def test_a_nan_names_its_step_and_the_way_on(place: Path) -> None:
    done, folder = fail(place, "nan")
    assert state(folder).reason == "rank 1 failed: NaN in the loss at step 3"
    way = value(done.stdout, "to go on")
    assert f"load={folder.checkpoints / 'iter_0000002'} load_state=all" in way
    assert "lr.lr=0.001 " in way
    assert [file.name for file in folder.checkpoints.glob("iter_*")] == ["iter_0000002"]


def test_a_loader_that_raises_is_named_as_such(place: Path) -> None:
    _, folder = fail(place, "data")
    assert state(folder).reason == (
        "rank 1 failed: the data loader failed at step 3: OSError: [Errno 5] Input/output error"
    )
