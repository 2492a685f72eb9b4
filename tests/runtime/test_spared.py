"""What is imported only in case somebody needs it is not imported where nobody does."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import SmallJobs

from megaplug.runtime import spared

ROOT = Path(__file__).resolve().parents[2]
SPARED = ("torch._inductor", "transformers", "wandb")
# What a rank does first, and what has come with it; then somebody imports one after all.
_RANK = """
import json, sys
import megaplug.runtime.pretrain
assert "megatron.core" not in sys.modules
from megaplug.runtime import cpu, fused_adam, repairs, spared
assert spared.compile_nothing()
with spared.kept_out(spared.unused_packages(["--tokenizer-type", "NullTokenizer"])):
    cpu.install()
    repairs.apply()
    fused_adam.install()
    from megatron.core.tokenizers.text import libraries
import torch
assert torch.compile(len) is len
@torch.compile(dynamic=True)
def doubled(x): return 2 * x
found = [name for name in sys.argv[1:] if name in sys.modules]
import wandb
print(json.dumps([found, wandb.__name__, doubled(3)]))
"""


def test_a_rank_on_the_cpu_loads_neither_the_compiler_nor_packages_that_its_job_does_not_use() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RANK, *SPARED],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], "wandb", 6]


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        (["--tokenizer-type", "NullTokenizer"], ["wandb", "transformers"]),
        (["--tokenizer-type", "TikTokenizer"], ["wandb", "transformers"]),
        (["--tokenizer-type", "HuggingFaceTokenizer"], ["wandb"]),
        (["--tokenizer-type", "NullTokenizer", "--wandb-project", "mine"], ["transformers"]),
        ([], ["wandb"]),
    ],
    ids=["bytes", "tiktoken", "Hugging Face", "W&B", "nothing said"],
)
def test_only_what_the_job_does_not_use_is_kept_out(words: list[str], unused: list[str]) -> None:
    assert spared.unused_packages(words) == unused


def test_a_job_s_own_words_say_it(small_jobs: SmallJobs) -> None:
    from megaplug.job.freeze import read_frozen

    folder, _ = small_jobs.freeze(["name=spared", "logging.wandb_project=mine"])
    assert spared.unused_packages(read_frozen(folder.job_file).megatron_args) == ["transformers"]


def test_what_is_there_already_stays_and_what_is_not_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nobody_has_imported_it.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    with spared.kept_out(["json", "nobody_has_imported_it"]):
        assert importlib.import_module("json") is json
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("nobody_has_imported_it")
    assert importlib.import_module("nobody_has_imported_it").answer == 42


def test_where_torch_may_compile_its_compiler_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    before = torch.compile
    assert not spared.compile_nothing()
    assert torch.compile is before
