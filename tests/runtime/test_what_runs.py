"""The kernels are named from the objects that Megatron has built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_jobs import SmallJobs

from megaplug.runtime import what_runs

ONE_STEP = ["train.iters=1", "lr=constant"]


def kernels(small_jobs: SmallJobs, *words: str, plant: Any = None) -> dict:
    folder = small_jobs.run([*ONE_STEP, *words], plant=plant)
    return json.loads(folder.kernels_file.read_text())


def another_adam_is_bound() -> None:
    import torch
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads

    class FusedAdam(torch.optim.AdamW):
        __module__ = "apex.optimizers.fused_adam"

        def __init__(self, params: Any, *, adam_w_mode: bool, **options: Any) -> None:
            super().__init__(params, **options)

    def multi_tensor_scale(*args: Any) -> Any:
        return real(*args)

    real, multi_tensor_scale.__module__ = clip_grads.multi_tensor_scale_impl, "amp_C"
    multi_tensor_scale.__qualname__ = "multi_tensor_scale"
    optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam = False, FusedAdam
    clip_grads.multi_tensor_scale_impl = multi_tensor_scale


def test_a_job_says_what_it_ran_on(small_jobs: SmallJobs) -> None:
    found = kernels(small_jobs, "name=says", "topology.dp=2")
    assert found["attention"] == "megaplug FlashAttention (torch's flash_attention)"
    assert found["norm"] == "megaplug RMSNorm"
    assert "Megatron ColumnParallelLinear" in found["linear"]
    assert found["optimizer"] == "torch AdamW (fused)"
    assert found["cross_entropy"] == "megaplug vocab_parallel_cross_entropy"
    assert "local_multi_tensor_scale" in found["clipping"]
    assert found["weight_gradients"].startswith("torch")
    assert found["overlap"]["overlap_grad_reduce"] == "on"
    parts = "attention norm linear cross_entropy weight_gradients optimizer clipping overlap"
    assert sorted(found) == sorted(parts.split())


def test_of_several_attentions_each_is_named_with_its_layers() -> None:
    """Layers of two chunks of a stage of a virtual pipeline."""

    class Dense(torch.nn.Module):
        pass

    class Dilated(torch.nn.Module):
        def kernel_name(self) -> str:
            return "some kernel"

    def layer(number: int, core: torch.nn.Module) -> torch.nn.Module:
        holder = torch.nn.Module()
        holder.layer_number, holder.core_attention = number, core  # type: ignore[assignment]
        return holder

    chunks = [
        torch.nn.ModuleList([layer(1, Dense()), layer(2, Dilated())]),
        torch.nn.ModuleList([layer(number, Dense()) for number in (5, 7, 9, 10, 11)]),
    ]
    named = what_runs._attentions(list(chunks))
    dense, _, dilated = named.partition(" and 2 more, ")
    assert dense.endswith("Dense in layers 1, 5, 7, 9")
    assert dilated.endswith("Dilated (some kernel) in layer 2")
    assert " in " not in what_runs._attentions([chunks[1]])


def test_names_follow_the_objects_and_not_the_configuration(small_jobs: SmallJobs) -> None:
    found = kernels(small_jobs, "name=other", "attention=local", plant=another_adam_is_bound)
    assert found["attention"] == "Megatron DotProductAttention"
    assert found["optimizer"].startswith("Apex") and "FusedAdam" in found["optimizer"]
    assert "Apex multi_tensor_scale" in found["clipping"]


def test_without_clipping_none_is_named(small_jobs: SmallJobs) -> None:
    assert kernels(small_jobs, "name=unclipped", "optimizer.clip_grad=0.0")["clipping"].startswith("none")


def fused_modules() -> list[dict[str, str]]:
    import torch

    from megaplug.runtime import cpu, what_runs

    cpu.install()

    def chunk(**attributes: Any) -> list[torch.nn.Module]:
        linear = torch.nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(linear, name, value)
        return [torch.nn.ModuleDict({"linear_fc1": linear})]

    return [
        what_runs.kernels(chunk(**attributes), None)
        for attributes in ({}, {"gradient_accumulation_fusion": True}, {"fuse_wgrad_accumulation": True})
    ]


def test_fused_weight_gradients_are_told_from_plain_ones(tmp_path: Path) -> None:
    plain, apex, te = (found["weight_gradients"] for found in run_ranks(1, fused_modules, folder=tmp_path)[0])
    assert plain.startswith("torch matmul")
    assert "fused_weight_gradient_mlp_cuda" in apex
    assert "Transformer Engine" in te


@pytest.mark.parametrize(
    "text", ["kernels that run", "cross entropy     Megatron vocab_parallel_cross_entropy"]
)
def test_a_person_is_shown_what_runs(text: str) -> None:
    from megaplug.launchers.track import event_text

    event = {"event": "kernels", "time": 1.0, "rank": 0, "kernels": {"attention": "a", "norm": "b"}}
    parts = {"cross_entropy": "Megatron vocab_parallel_cross_entropy", "weight_gradients": "torch"}
    assert text in (event_text({**event, "kernels": parts}) or "")
