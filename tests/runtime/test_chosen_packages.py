"""What Megatron binds at import under each word of ``kernels.*``, with stand-in packages installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_packages as fakes
import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a rank does first, then what Megatron has bound. It is told to be on CUDA: the imports need none.
_RANK = """
import json, sys
import megaplug.runtime.pretrain
from megaplug.errors import UserError
from megaplug.job.schema import KernelsConfig
from megaplug.runtime import packages
try:
    choices = packages.choose(KernelsConfig(apex=sys.argv[1], te=sys.argv[2]), sys.argv[3])
except UserError as error:
    print(json.dumps({"error": str(error), "megatron": "megatron" in sys.modules}))
    sys.exit()
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
print(json.dumps({
    "optimizer": optimizer.Adam.__module__,
    "norm": clip_grads.l2_norm_impl.__module__,
    "scale": clip_grads.multi_tensor_scale_impl.__module__,
    "weight_gradients": layers._grad_accum_fusion_available,
    "reasons": {choice.key: choice.reason for choice in choices},
    "news": [choice.key for choice in choices if choice.is_news],
    "arguments": packages.arguments(choices),
}))
"""


def rank(folder: Path, apex: str, te: str, device: str = "cuda") -> dict:
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RANK, apex, te, device],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    return fakes.write(folder, fakes.NVIDIAS_APEX, fakes.TRANSFORMER_ENGINE, fakes.WEIGHT_GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apex", "te", "optimizer", "clipping", "fused"),
    [
        (
            "auto",
            "auto",
            "transformer_engine.pytorch.optimizers",
            "transformer_engine.pytorch.optimizers",
            True,
        ),
        ("auto", "off", "apex.optimizers", "amp_C", True),
        pytest.param("require", "off", "apex.optimizers", "amp_C", True, marks=pytest.mark.soak),
        (
            "off",
            "require",
            "transformer_engine.pytorch.optimizers",
            "transformer_engine.pytorch.optimizers",
            False,
        ),
        ("off", "off", "torch.optim.adamw", "megatron.core.utils", False),
    ],
)
def test_megatron_binds_what_the_words_say(both, apex, te, optimizer, clipping, fused):
    found = rank(both, apex, te)
    assert (found["optimizer"], found["norm"], found["scale"]) == (optimizer, clipping, clipping)
    assert found["weight_gradients"] is fused
    assert found["reasons"] == {
        key: f"kernels.{key}=off" if word == "off" else "" for key, word in (("te", te), ("apex", apex))
    }


@pytest.mark.slow
def test_without_a_gpu_nothing_of_both_is_taken(both):
    found = rank(both, "auto", "auto", "cpu")
    assert found["optimizer"] == "torch.optim.adamw"
    assert set(found["reasons"].values()) == {"it needs a GPU"}


def test_another_project_called_apex_is_never_imported(tmp_path):
    fakes.write(tmp_path, fakes.OTHER_APEX)
    assert "another project, not NVIDIA's" in rank(tmp_path, "require", "auto")["error"]


@pytest.mark.slow
def test_another_project_called_apex_is_kept_from_megatron(tmp_path):
    fakes.write(tmp_path, fakes.OTHER_APEX)
    found = rank(tmp_path, "auto", "auto")
    assert found["optimizer"] == "torch.optim.adamw"
    assert "another project, not NVIDIA's" in found["reasons"]["apex"]


@pytest.mark.slow
def test_an_extension_that_cannot_be_imported_keeps_apex_out_and_weight_gradients_unfused(both, tmp_path):
    whole = rank(both, "auto", "off")
    assert (whole["arguments"], whole["weight_gradients"]) == ([], True)
    broken = {"fused_weight_gradient_mlp_cuda.py": "raise ImportError('undefined symbol: c10')"}
    found = rank(fakes.write(tmp_path, fakes.NVIDIAS_APEX, broken), "auto", "off")
    assert found["news"] == ["apex"]
    assert "fused_weight_gradient_mlp_cuda cannot be imported: undefined symbol" in found["reasons"]["apex"]
    assert found["arguments"] == ["--no-gradient-accumulation-fusion"]
    assert found["weight_gradients"] is False


@pytest.mark.slow
def test_what_cannot_be_imported_is_said_and_kept_out(tmp_path):
    fakes.write(tmp_path, fakes.BROKEN_TRANSFORMER_ENGINE)
    found = rank(tmp_path, "auto", "auto")
    assert found["news"] == ["te"]
    assert "libcudart.so.99" in found["reasons"]["te"]
    assert found["optimizer"] == "torch.optim.adamw"


def test_what_is_required_and_cannot_be_imported_ends_the_rank_before_megatron_is_imported(tmp_path):
    fakes.write(tmp_path, fakes.BROKEN_TRANSFORMER_ENGINE)
    found = rank(tmp_path, "auto", "require")
    assert "libcudart.so.99" in found["error"]
    assert "docs/kernels.md" in found["error"]
    assert not found["megatron"]
