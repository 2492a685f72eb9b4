"""The house stands as DESIGN says, and each rule has been seen to catch what it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import house_rules as house
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rule(rule):
    assert rule(ROOT) == []


# Rule, file, text that must be caught.
PLANTED = [
    ("strangers", "megaplug/topology.py", "from megaplug.job.schema import Job"),
    ("strangers", "megaplug/runs/lock.py", "def f():\n    from megaplug import topology"),
    ("strangers", "megaplug/job/checks.py", "from megaplug.layers.norm import RMSNorm"),
    ("strangers", "megaplug/job/checks.py", "from ..plan import doctor"),
    (
        "strangers",
        "megaplug/launchers/local.py",
        "import importlib\nimportlib.import_module('megaplug.runtime.cpu')",
    ),
    ("strangers", "megaplug/data/prepare.py", "import megaplug.launchers.machine"),
    ("strangers", "megaplug/layers/norm.py", "from megaplug.job.schema import ModelConfig"),
    ("strangers", "megaplug/runtime/pretrain.py", "from megaplug.commands.train import main"),
    ("strangers", "megaplug/commands/train.py", "from megaplug.layers import spec"),
    ("strangers", "megaplug/plan/memory.py", "def f():\n    from megaplug.runtime import cpu"),
    ("strangers", "megaplug/plan/rehearsal.py", "from megaplug.runtime import cpu"),
    ("strangers", "megaplug/errors.py", "import megaplug.job"),
    ("strangers", "megaplug/__init__.py", "import megaplug.job"),
    ("strangers", "megaplug/newroom/thing.py", "x = 1"),
    ("strangers", "launch/train.py", "from megaplug.job.compose import compose"),
    ("guests_of_layers", "megaplug/layers/norm.py", "import numpy"),
    ("guests_of_layers", "megaplug/layers/norm.py", "from megatron.training import get_args"),
    ("torch_at_import", "megaplug/job/checks.py", "import torch"),
    ("torch_at_import", "megaplug/layers/__init__.py", "from torch import nn"),
    ("torch_at_import", "megaplug/layers/registry.py", "from megatron.core import parallel_state"),
    (
        "torch_at_import",
        "megaplug/plan/rehearsal.py",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
    ),
    ("torch_at_import", "megaplug/data/indexed.py", "class A:\n    import torch.nn as nn"),
    ("long_files", "benchmarks/speed.py", "x = 1\n" * 501),
    ("long_files", "tests/test_all.py", "x = 1\n" * 501),
    ("long_files", "megaplug/job/checks.py", "x = 1\n" * 151),
    ("stand_ins", "megaplug/runtime/pretrain.py", "import torch\ntorch.cuda.current_device = lambda: 'cpu'"),
    ("stand_ins", "megaplug/runtime/pretrain.py", "import torch\nsetattr(torch.cuda, 'synchronize', None)"),
    ("stand_ins", "megaplug/runtime/repairs.py", "import torch.cuda as c\nc.empty_cache = None"),
    ("stand_ins", "megaplug/runtime/repairs.py", "from torch import Tensor\nTensor.cuda = lambda self: self"),
    ("stand_ins", "megaplug/layers/norm.py", "import torch\na, torch.nn.Module.cuda = 1, 2"),
    (
        "stand_ins",
        "megaplug/plan/rehearsal.py",
        "from unittest.mock import patch\npatch('torch.cuda.is_available')",
    ),
    ("guests_of_layers", "megaplug/layers/norm.py", "from megatron import training"),
    ("unsafe_reading", "megaplug/runs/checkpoints.py", "import pickle"),
    ("unsafe_reading", "megaplug/runs/checkpoints.py", "def f():\n    from cloudpickle import loads"),
    ("unsafe_reading", "megaplug/runtime/pretrain.py", "import torch\ntorch.load('x')"),
    (
        "unsafe_reading",
        "tests/runtime/test_x.py",
        "from torch import load as read\nread('x', weights_only=False)",
    ),
    ("unsafe_reading", "megaplug/data/indexed.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    ("machine_traces", "README.md", "cd " + "/ho" + "me/someone/megaplug"),
    ("machine_traces", "conf/train.yaml", 'runs_dir: "' + "/ro" + 'ot/runs"'),
    ("machine_traces", "Makefile", "pip install --extra-index" + "-url x"),
    ("machine_traces", "Makefile", "pip install -i https://packages.example.org" + "/simple"),
]


@pytest.mark.parametrize(("rule", "file", "text"), PLANTED)
def test_a_planted_fault_is_caught(tmp_path, rule, file, text):
    plant(tmp_path, file, text)
    assert len(getattr(house, rule)(tmp_path)) == 1


def test_more_than_one_in_ten_files_over_350_lines_is_caught(tmp_path):
    for number in range(9):
        plant(tmp_path, f"megaplug/job/short{number}.py", "x = 1\n" * 10)
    plant(tmp_path, "megaplug/job/long.py", "x = 1\n" * 400)
    assert house.long_files(tmp_path) == []
    plant(tmp_path, "megaplug/job/longer.py", "x = 1\n" * 400)
    assert house.long_files(tmp_path) == ["2 of 11 files have 350 lines or more"]


def test_source_that_git_ignores_is_caught(tmp_path):
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    plant(tmp_path, "megaplug/runs/lock.py", "x = 1")
    plant(tmp_path, ".gitignore", "/runs/")
    assert house.ignored_sources(tmp_path) == []
    plant(tmp_path, ".gitignore", "runs/")
    assert house.ignored_sources(tmp_path) == ["megaplug/runs/lock.py: ignored by git"]


# File and text that no rule may object to.
HARMLESS = [
    ("megaplug/job/checks.py", "from megaplug import errors, topology\nfrom megaplug.layers import registry"),
    ("megaplug/data/indexed.py", "def f():\n    import torch\n    return torch"),
    ("megaplug/job/checks.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ("megaplug/plan/rehearsal.py", "def f():\n    from megaplug.runtime import cpu\n    return cpu"),
    ("megaplug/plan/doctor/probe.py", "def f():\n    import megaplug.runtime.cpu"),
    ("megaplug/layers/norm.py", "import math\nimport torch\nfrom megatron.core import parallel_state"),
    ("megaplug/runtime/cpu.py", "import torch\ntorch.cuda.current_device = lambda: torch.device('cpu')"),
    (
        "megaplug/runtime/pretrain.py",
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = False\nself.cuda = 1",
    ),
    ("megaplug/runs/checkpoints.py", "import pickletools"),
    ("megaplug/runtime/pretrain.py", "import torch\ntorch.load('x', weights_only=True)"),
    ("tests/runtime/test_x.py", "import pickle"),
    ("README.md", "see https://docs.python.org/3/ and ./runs/homework/x and --config-dir=/path/to/conf"),
]


@pytest.mark.parametrize(("file", "text"), HARMLESS)
def test_no_rule_objects_to_what_is_allowed(tmp_path, file, text):
    for module in (
        "megaplug/errors.py",
        "megaplug/topology.py",
        "megaplug/layers/registry.py",
        "megaplug/runtime/cpu.py",
    ):
        plant(tmp_path, module, "")
    plant(tmp_path, file, text)
    assert [fault for rule in house.RULES for fault in rule(tmp_path)] == []


@pytest.mark.parametrize("module", ["megaplug.commands.train", "megaplug.commands.plan"])
def test_a_command_is_imported_without_anything_heavy(module):
    heavy = ["torch", "megatron", "numpy", "rich", "matplotlib", "tensorboard", "transformers", "tokenizers"]
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def plant(root: Path, file: str, text: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
