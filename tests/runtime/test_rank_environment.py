"""How many queues to a GPU a rank is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megaplug.errors import UserError
from megaplug.runtime import environment


def job(tp: int = 1, cp: int = 1, device: str = "cuda", flags: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(
        derived=SimpleNamespace(device=device),
        megatron_args=[
            "--bf16", "--tensor-model-parallel-size", str(tp), "--context-parallel-size", str(cp), *flags,
        ],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(environment, "_compute_capability", lambda: 9)


@pytest.mark.parametrize("given", [None, "1", "8"])
def test_data_parallel_ranks_keep_what_is_there(given):
    assert environment.queues(job(), given) == given


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}])
def test_tensor_and_context_parallelism_need_one(sizes, device):
    assert environment.queues(job(**sizes, device=device), None) == "1"
    with pytest.raises(UserError, match=r"=8 is set.*need 1"):
        environment.queues(job(**sizes, device=device), "8")


def test_from_blackwell_on_they_do_not(monkeypatch):
    monkeypatch.setattr(environment, "_compute_capability", lambda: 10)
    assert environment.queues(job(tp=2), None) is None
    assert environment.queues(job(tp=2), "8") == "8"


@pytest.mark.parametrize("flag", ["--use-megatron-fsdp", "--use-torch-fsdp2"])
def test_fsdp_never_has_one(flag):
    assert environment.queues(job(tp=2, flags=(flag,)), None) is None
    with pytest.raises(UserError, match="unset CUDA_DEVICE_MAX_CONNECTIONS"):
        environment.queues(job(flags=(flag,)), "1")
