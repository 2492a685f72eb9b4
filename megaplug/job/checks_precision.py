"""fp16 with its loss scale, and FP8: what they need and exclude."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job

FP8_FORMATS = ("e4m3", "hybrid")
# Recipe: the compute capability that Transformer Engine asks for.
FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def precision_problems(job: Job, device: str | None, backend: str | None) -> list[Problem]:
    """Everything that is wrong with the number formats.

    Args:
        job: The job.
        device: ``cpu`` or ``cuda``; None where it is not known yet.
        backend: ``native`` or ``te``; None where it is not known yet.
    """
    return [*_fp16(job), *_fp8(job, device, backend)]


def _fp16(job: Job) -> Iterator[Problem]:
    precision = job.precision
    if precision.fp16 and precision.bf16:
        yield Problem(
            "precision.fp16", "bf16 and fp16 cannot both be", "use precision=fp16 or precision=bf16"
        )
    if precision.grad_reduce_in_bf16 and not precision.bf16:
        message = f"gradients are reduced in bf16 only with bf16 weights, not with {precision.dtype}"
        yield Problem("precision.grad_reduce_in_bf16", message, "leave it out")
    if precision.loss_scale is not None and not precision.fp16:
        message = f"only fp16 needs a scaled loss, and the weights are {precision.dtype}"
        yield Problem("precision.loss_scale", message, "use precision=fp16, or leave it out")
    if precision.min_loss_scale > precision.initial_loss_scale:
        message = f"{precision.min_loss_scale:g} is above the first scale, {precision.initial_loss_scale:g}"
        yield Problem("precision.min_loss_scale", message, "use less, or a larger initial_loss_scale")


def _fp8(job: Job, device: str | None, backend: str | None) -> Iterator[Problem]:
    precision, key = job.precision, "precision.fp8_format"
    if precision.fp8_format is None:
        if precision.fp8_param_gather:
            yield Problem("precision.fp8_param_gather", "there are no FP8 weights", "use precision=fp8")
        return
    if precision.fp8_recipe not in FP8_CAPABILITY:
        message = f"cannot be {precision.fp8_recipe!r}"
        yield Problem("precision.fp8_recipe", message, f"one of {', '.join(FP8_CAPABILITY)}")
    if not precision.bf16:
        message = f"what is not FP8 is bf16, not {precision.dtype}"
        yield Problem(key, message, "use precision=fp8, or precision.bf16=true")
    if device == "cpu":
        yield Problem(
            key, "FP8 needs a GPU with Transformer Engine, and the device is cpu", "use precision=bf16"
        )
    elif backend == "native":
        message = "FP8 is Transformer Engine's, and the backend is native"
        yield Problem(key, message, "use backend=te, where it is installed, or precision=bf16")
    recomputed = sorted({"layernorm", "moe_act"} & set(job.train.recompute_modules or ()))
    if recomputed and precision.fp8_recipe == "delayed":
        message = f"the recipe delayed cannot compute {', '.join(recomputed)} again"
        yield Problem("train.recompute_modules", message, "use another recipe, or leave it out")
    yield from _fp8_sizes(job)


def _fp8_sizes(job: Job) -> Iterator[Problem]:
    """FP8 kernels take rows of a multiple of 16 elements, MXFP8 of 32 (Transformer Engine's guide)."""
    multiple = 32 if job.precision.fp8_recipe == "mxfp8" else 16
    tp = max(1, job.topology.tp)
    sizes = {
        "model.hidden_size": job.model.hidden_size,
        "model.ffn_hidden_size": job.model.ffn_hidden_size // tp,
    }
    for key, size in sizes.items():
        if size % multiple:
            message = f"{size} elements on a rank are not a multiple of {multiple}, as FP8 needs"
            yield Problem(key, message, f"use a multiple of {multiple * (tp if 'ffn' in key else 1)}")
