"""The memory model against what Megatron-LM's functional tests measured on A100."""

from __future__ import annotations

from statistics import median

import pytest

from benchmarks.published.ci_memory import MeasuredMemory, ci_memory, with_attention
from megaplug.plan.in_flight import chunks_of
from megaplug.plan.memory import stage_memory
from megaplug.plan.parameters import stage_parameters
from megaplug.plan.step_ends import standing_buffers

MIB = 1024**2
# Bytes allocated beside the model's on every rank of these runs: workspaces of cuBLAS, 32 MiB a handle as
# CUBLAS_WORKSPACE_CONFIG asks for, and of Transformer Engine.
PLATFORM = 80 * MIB

# Each exception's reason.
STATE_EXCEPTIONS = {
    ("gpt/gpt3_mcore_te_tp1_pp4_vp1_resume_torch_dist_dist_optimizer_overlap_grad_reduce", 635): (
        "one software version held fp32 gradients twice: 134 MiB = 4 bytes x 35,213,824 parameters; the four "
        "other rows of the case lie there with 497 or 498 MiB"
    ),
}
PEAK_EXCEPTIONS = {
    "gpt/gpt3_mcore_te_tp1_pp4_vp1_tunable_overlap": (
        "groups of 5 microbatches (microbatch-group-size-per-virtual-pipeline-stage), which no column says: "
        "one microbatch more of two virtual stages is in flight, 460 MiB"
    ),
}


def last(measured: MeasuredMemory) -> int:
    return measured.workload.topology.pp - 1


def beside_state(measured: MeasuredMemory) -> float:
    """Bytes that were allocated between two steps and are not the model's state or a buffer that stays."""
    load = measured.workload
    found = measured.allocated - stage_memory(load, last(measured)).state
    # fp32 copies of fp16 gradients lie there until the next step begins.
    held = stage_parameters(load.shape, load.topology, last(measured))
    cut = held.dense / (load.topology.dp * load.topology.cp) + held.expert / load.topology.expert_dp
    found -= load.precision.for_step * (cut if load.sharing.zero else held.total)
    is_megatrons_own = measured.workload.code.backend == "native"
    return found - (standing_buffers(load, chunks_of(load, last(measured))) if is_megatrons_own else 0)


def test_parameters_of_the_last_rank_are_exact():
    rows = ci_memory()
    assert len(rows) == 236
    for row in rows:
        found = stage_parameters(row.workload.shape, row.workload.topology, last(row))
        assert found.total == row.parameters, row.case


def test_state_is_what_was_allocated_but_for_one_constant_of_the_platform():
    """Within 64 MiB for all cases without grouped experts but the exceptions: at least 95 %."""
    rows = [row for row in ci_memory() if not row.has_grouped_experts]
    constant = median(beside_state(row) for row in rows)
    assert constant == pytest.approx(PLATFORM, abs=8 * MIB)
    off = {
        (row.case, round(row.allocated / MIB)) for row in rows if abs(beside_state(row) - constant) > 64 * MIB
    }
    assert off == set(STATE_EXCEPTIONS)
    assert len(off) <= 0.05 * len(rows)


def test_no_case_of_this_table_is_above_10_gb():
    """The demand of 3 % on cases above 10 GB is met by none: its largest peak is 4.67 GB."""
    assert max(row.peak for row in ci_memory()) < 5e9


def test_peaks_above_a_gib_and_a_half_are_within_three_percent_where_the_attention_is_known():
    rows = [row for row in ci_memory() if row.says_attention and row.peak > 1.5 * 1024 * MIB]
    checked = [row for row in rows if not row.has_grouped_experts]
    off = {}
    for row in checked:
        # Megatron's local attention is never flash.
        fused = row.workload.fused_attention and row.workload.code.backend != "native"
        predicted = stage_memory(with_attention(row, fused=fused), last(row)).total + PLATFORM
        if abs(predicted / row.peak - 1) > 0.03:
            off[row.case] = predicted / row.peak - 1
    assert len(checked) > 50
    assert set(off) == set(PEAK_EXCEPTIONS), off


def test_where_the_attention_is_not_said_one_of_two_kernels_explains_the_peak():
    """Rows of one case lie at two levels, as Transformer Engine's choice changed from flash to unfused."""
    rows = [
        row
        for row in ci_memory()
        if not row.says_attention
        and row.peak > 2 * 1024 * MIB
        and (row.case, round(row.allocated / MIB)) not in STATE_EXCEPTIONS
        and not any(word in row.case for word in ("tunable_overlap", "loss_fusion", "defer_embedding"))
    ]
    levels = set()
    for row in rows:
        errors = {
            fused: abs(
                (stage_memory(with_attention(row, fused=fused), last(row)).total + PLATFORM) / row.peak - 1
            )
            for fused in (True, False)
        }
        nearest = min(errors, key=lambda fused: errors[fused])
        assert errors[nearest] < 0.07, (row.line, row.case, errors)
        levels.add(nearest)
    assert levels == {True, False} and len(rows) > 40
