"""fp16 with Megatron's dynamic loss scale, on CPU ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
from small_jobs import SmallJobs, curve, state, steps

from megaplug.runs.folder import RunFolder

# A scale that is too large for the first steps, and grows after every three that went well.
FIRST_SCALE = 2.0**19
EIGHT_STEPS = [
    "precision=fp16",
    "train.iters=8",
    "lr=constant",
    "lr.lr=1e-3",
    f"precision.initial_loss_scale={FIRST_SCALE}",
    "precision.hysteresis=1",
    "precision.loss_scale_window=3",
]


def scales(folder: RunFolder) -> list[tuple[Any, Any]]:
    return [(line["loss_scale"], bool(line["skipped"])) for line in steps(folder)]


def test_a_step_that_overflows_is_skipped_and_shown_and_the_run_goes_on(small_jobs: SmallJobs) -> None:
    run = small_jobs.run([*EIGHT_STEPS, "name=fp16_whole"])
    assert state(run).status == "finished"
    found = scales(run)
    skipped = [is_skipped for _, is_skipped in found]
    assert skipped[0] and not all(skipped), "the first scale must overflow, and a later one must not"
    before = FIRST_SCALE
    for scale, is_skipped in found:
        assert scale == before / 2 if is_skipped else scale in (before, 2 * before)
        before = scale
    # The gradients of a skipped step are not told.
    lines = steps(run)
    assert all((line["grad_norm"] is None) == bool(line["skipped"]) for line in lines)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_the_scale_continues_with_the_run_bit_for_bit(small_jobs: SmallJobs) -> None:
    whole = small_jobs.run([*EIGHT_STEPS, "name=fp16_whole"])
    stopped = small_jobs.run([*EIGHT_STEPS, "name=fp16_parts", "train.stop_at=1"])
    assert all(is_skipped for _, is_skipped in scales(stopped)), "saved before Adam has any state"
    small_jobs.run([*EIGHT_STEPS, "name=fp16_parts", "train.stop_at=6"])
    continued = small_jobs.run([*EIGHT_STEPS, "name=fp16_parts"])
    assert curve(continued) == curve(whole)
    assert scales(continued) == scales(whole)
    assert len({scale for scale, is_skipped in scales(whole) if not is_skipped}) > 1, "it must have grown"


@pytest.mark.slow
def test_fp16_learns_what_fp32_learns(small_jobs: SmallJobs) -> None:
    """Within 1e-3 over six steps: fp16 has eleven bits of precision, about 5e-4."""
    words = ["train.iters=6", "lr=constant", "lr.lr=1e-3"]
    fp16 = curve(small_jobs.run([*words, "precision=fp16", "name=fp16"]))
    fp32 = curve(small_jobs.run([*words, "precision=fp32", "name=fp16_in_fp32"]))
    assert max(abs(one[0] - other[0]) / other[0] for one, other in zip(fp16, fp32, strict=True)) < 1e-3
