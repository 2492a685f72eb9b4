"""A package from elsewhere registers an attention; a config names it, and ranks train with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from document_commands import reader_environment
from live_command import ROOT, only_run, train
from small_jobs import SMALL, state, write_corpus

from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import read_metrics

DECLARATION = """
from megaplug.layers.registry import CORE_ATTENTION, Limits, Parameter, Plugin

plugin = Plugin(
    name="mean_of_values",
    kind=CORE_ATTENTION,
    target="other_house.layer:MeanOfValues",
    doc="attends to everything before it alike",
    parameters={"gain": Parameter(float, 1.0, "factor on the output")},
    limits=Limits(devices=("cpu",)),
)
"""

# Grouped values [s, b, groups, head] are averaged over the past and repeated for each group's query heads.
LAYER = """
import torch

class MeanOfValues(torch.nn.Module):
    def __init__(self, config, layer_number, attn_mask_type, attention_type, gain, **kwargs):
        super().__init__()
        self.gain = gain
        print(f"MeanOfValues of layer {layer_number} with gain {gain}", flush=True)

    def forward(self, query, key, value, attention_mask, **kwargs):
        count = torch.arange(1, value.shape[0] + 1, dtype=value.dtype).view(-1, 1, 1, 1)
        mean = self.gain * value.cumsum(0) / count
        repeated = mean.repeat_interleave(query.shape[2] // value.shape[2], dim=2)
        return repeated.flatten(2)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which the package is installed, as pip would leave it."""
    site = tmp_path / "site"
    package, info = site / "other_house", site / "other_house-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "declaration.py").write_text(DECLARATION)
    (package / "layer.py").write_text(LAYER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other_house\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[megaplug.layers]\nmean_of_values = other_house.declaration:plugin\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    corpus = write_corpus(tmp_path / "corpus")
    places = [f"data.cache_dir={tmp_path / 'cache'}", f"runs_dir={tmp_path / 'runs'}"]
    return [*SMALL, f"data.path={corpus}", *places, "train.iters=2", "lr=constant"]


NAMED = ["attention.name=mean_of_values", "attention.params.gain=0.5"]


def test_the_launcher_shows_and_checks_it(words: list[str], environment: dict[str, str]) -> None:
    done = train(*words, *NAMED, "launch=print", env=environment)
    assert done.returncode == 0, done.stderr
    assert "mean_of_values attention" in done.stdout and "gain: 0.5" in done.stdout

    unknown = train(*words, *NAMED, "launch=print")
    assert unknown.returncode == 2
    assert "'mean_of_values'" in unknown.stderr

    wrong = train(*words, *NAMED, "attention.params.gian=2", "topology=cp2", env=environment)
    assert wrong.returncode == 2
    assert "attention.params.gian" in wrong.stderr and "'gain'" in wrong.stderr
    assert "topology.cp" in wrong.stderr


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder.metrics_file) if "loss" in line]


@pytest.mark.slow
def test_ranks_train_with_it_and_plain_megatron_by_the_printed_command_too(
    words: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    done = train(*words, *NAMED, "topology.dp=2", "train.global_batch_size=4", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(tmp_path / "runs")
    assert (state(folder).status, len(losses(folder))) == ("finished", 2)
    assert "MeanOfValues of layer 4 with gain 0.5" in folder.log_file(1).read_text()
    assert str(ROOT) not in environment["PYTHONPATH"]

    # What stands in the place of pretrain_gpt.py has the arguments and the environment of command.sh only.
    shutil.rmtree(folder.checkpoints)
    entry = tmp_path / "pretrain_gpt.py"
    # Megatron's writers of checkpoints are spawned and import this file again, as they do with the real one.
    entry.write_text('import plain_pretrain\n\nif __name__ == "__main__":\n    plain_pretrain.main()\n')
    paths = [environment["PYTHONPATH"], str(ROOT), str(ROOT / "tests" / "parity")]
    measured = tmp_path / "curve.json"
    plain = subprocess.run(
        ["sh", str(folder.command_file)],
        cwd=tmp_path,
        env={
            **reader_environment(tmp_path / "reader"),
            "PYTHONPATH": os.pathsep.join(paths),
            "PLAIN_CURVE": str(measured),
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert plain.returncode == 0, plain.stdout[-2000:] + plain.stderr[-4000:]
    assert "MeanOfValues of layer 4 with gain 0.5" in plain.stdout
    assert [loss for loss, _ in json.loads(measured.read_text())] == losses(folder)


@pytest.mark.slow
def test_the_printed_command_does_not_start_where_the_package_is_missing(
    words: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    assert train(*words, *NAMED, "launch=freeze", env=environment, cwd=tmp_path).returncode == 0
    folder = only_run(tmp_path / "runs")
    done = subprocess.run(
        ["sh", str(folder.command_file)],
        env=reader_environment(tmp_path / "reader"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "'mean_of_values'" in done.stderr and "torchrun" not in done.stderr
