"""What is wrong with ``kernels.*`` is found before anything starts, by what is installed."""

from __future__ import annotations

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job import packages
from megaplug.job.checks import check
from megaplug.job.identity import digest, identity
from megaplug.job.translate import megatron_arguments


@pytest.fixture
def installed(monkeypatch):
    """Says what of Apex, Transformer Engine and the extension for weight gradients is installed."""

    def make(*names: str) -> None:
        monkeypatch.setattr(packages, "is_installed", lambda key: key in names)
        monkeypatch.setattr(packages, "find_apex", lambda: None)
        monkeypatch.setattr(packages, "has_weight_gradient_fusion", lambda: "weight_gradients" in names)

    make()
    return make


def problems(*words: str, device: str = "cuda") -> str:
    return "\n".join(map(str, check(small_job(*words), device=device)))


@pytest.mark.parametrize("key", ["apex", "te"])
def test_what_is_required_has_to_be_there(installed, key):
    assert f"kernels.{key}: {packages.NAMES[key]} is required, but it is not installed" in problems(
        f"kernels.{key}=require"
    )
    assert "it needs a GPU" in problems(f"kernels.{key}=require", device="cpu")
    installed(key)
    assert problems(f"kernels.{key}=require") == ""


def test_the_registrys_apex_is_not_nvidias(installed, monkeypatch):
    monkeypatch.setattr(packages, "find_apex", lambda: packages.Apex("/site/apex", is_nvidias=False))
    assert "/site/apex is another project, not NVIDIA's" in problems("kernels.apex=require")


def test_backend_te_contradicts_te_off(installed):
    installed("te")
    assert "kernels.te=off keeps out the Transformer Engine" in problems("backend=te", "kernels.te=off")
    assert problems("backend=native", "kernels.te=require") == ""


def test_a_word_that_is_none_is_refused(installed):
    assert "did you mean require" in problems("kernels.te=required")


def test_weight_gradients_are_fused_only_with_the_extension(installed):
    def is_fused(*words: str) -> bool:
        return "--no-gradient-accumulation-fusion" not in megatron_arguments(
            *resolved(*words, device="cuda"), FOLDER
        )

    assert not is_fused()
    assert "is not installed" in packages.packages_line("auto", "auto", "cuda", "native")
    assert "cannot be fused" in problems("megatron.gradient_accumulation_fusion=true")
    installed("weight_gradients")
    assert not is_fused()
    assert "no Apex: it is not installed" in problems("megatron.gradient_accumulation_fusion=true")
    installed("apex", "weight_gradients")
    assert is_fused()
    assert problems("megatron.gradient_accumulation_fusion=true") == ""
    assert not is_fused("kernels.apex=off")
    assert packages.packages_line("auto", "auto", "cuda", "native") == (
        "no Transformer Engine (it is not installed), Apex's"
    )


def test_whose_kernels_run_belongs_to_the_identity_and_the_word_does_not(installed):
    def digest_of(*words: str) -> str:
        return digest(identity(*resolved(*words, device="cuda")))

    without = digest_of()
    assert digest_of("kernels.te=off") == without
    installed("te")
    assert digest_of("kernels.te=auto") == digest_of("kernels.te=require") != without
    assert digest_of("kernels.te=off") == without
