"""Whether training goes on while a checkpoint is written is known, or refused by name, before the start."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job.checks import check
from megaplug.job.saving import async_problems, async_strategy
from megaplug.job.translate import megatron_arguments

ON = "checkpoint.async_save=true"
NVRX = "checkpoint.async_strategy=nvrx"


@pytest.fixture
def nvrx(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRx as if it were installed."""
    real = importlib.util.find_spec
    found = real("json")

    def find_spec(name: str, *more: Any) -> Any:
        return found if name.startswith("nvidia_resiliency_ext") else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("words", "device", "strategy"),
    [
        ([], "cpu", "mcore"),
        ([], "cuda", ""),
        (["checkpoint.async_save=false"], "cpu", ""),
        ([ON], "cuda", "mcore"),
        (["topology.zero=0"], "cpu", "mcore"),
        (["topology.zero=3", "topology.fsdp=torch"], "cpu", "mcore"),
        (["topology.zero=2"], "cpu", ""),
    ],
)
def test_who_saves_while_training_goes_on(words: list[str], device: str, strategy: str) -> None:
    assert async_strategy(small_job(*words), device) == strategy


@pytest.mark.parametrize(
    ("words", "device", "strategy"),
    [
        ([], "cpu", "mcore"),
        ([], "cuda", ""),
        ([ON], "cpu", "mcore"),
        ([ON], "cuda", "nvrx"),
        ([ON, "checkpoint.async_strategy=mcore"], "cuda", "mcore"),
        ([ON, "topology.zero=2"], "cuda", "nvrx"),
    ],
)
def test_nvrx_saves_on_a_gpu_where_it_is_installed(
    nvrx: None, words: list[str], device: str, strategy: str
) -> None:
    assert async_strategy(small_job(*words), device) == strategy


@pytest.mark.parametrize(
    ("words", "device", "said"),
    [
        ([ON, "topology.zero=2"], "cuda", "topology.zero=2, format fsdp_dtensor"),
        ([ON, "topology.zero=3"], "cuda", "by NVRx only"),
        ([ON, NVRX], "cpu", "needs a GPU"),
        ([ON, NVRX], "cuda", "which is not installed"),
        ([ON, "optimizer.optimizer_cpu_offload=true"], "cuda", "optimizer.optimizer_cpu_offload"),
    ],
)
def test_what_cannot_be_saved_so_is_refused_by_name(words: list[str], device: str, said: str) -> None:
    (problem,) = async_problems(small_job(*words), device)
    assert problem.key == "checkpoint.async_save" and said in problem.message
    assert problem.hint == "use checkpoint.async_save=false"
    assert async_strategy(small_job(*words), device) == ""


def test_what_can_be_saved_so_or_is_not_asked_is_no_problem() -> None:
    for words in ([], [ON], [ON, "topology.zero=0"], ["checkpoint.async_save=false", "topology.zero=2"]):
        assert list(async_problems(small_job(*words), "cpu")) == []
    (problem,) = check(small_job("checkpoint.async_save=false", NVRX))
    assert problem.key == "checkpoint.async_strategy" and "async_save=false" in problem.message
    (problem,) = check(small_job("checkpoint.async_strategy=nvidia"))
    assert problem.key == "checkpoint.async_strategy"


def test_megatron_is_told_of_nvrx_alone(nvrx: None) -> None:
    words = megatron_arguments(*resolved(ON, device="cuda"), FOLDER)
    assert {"--async-save", "--use-persistent-ckpt-worker"} <= set(words)
    assert words[words.index("--async-strategy") + 1] == "nvrx"
    assert "--async-save" not in megatron_arguments(*resolved(ON), FOLDER)
