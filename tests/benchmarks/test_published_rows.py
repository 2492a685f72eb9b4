"""The readers of the published tables: every row is read, is legal, and says what the paper says."""

from __future__ import annotations

import pytest

from benchmarks.published.bridge import bridge, left_out
from benchmarks.published.record import Measured, find, rows_of
from benchmarks.published.tables import TABLES, all_measured
from megaplug.plan.cluster import preset_names
from megaplug.topology import violations

# Rows that no Megatron can have run as they stand: what the table says must have another size.
ILLEGAL = {
    # The second figures are of PP 8; EP 64 x PP 8 are 512 ranks, and there are 256.
    "line 146: DeepSeekV3 (tokendrop) FP8 DGX-GB200 x 256 25.09 (second)": "topology.ep",
}


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    return all_measured()


@pytest.mark.slow
def test_every_line_of_every_table_is_a_measurement_or_is_listed():
    counts = {name: len(read()) for name, read in TABLES.items()}
    assert counts == {
        "vtrain": 1440,
        "sc21": 10,
        "korthikanti": 2 * 4,  # each with full and with selective recompute
        "readme_h100": 9,
        "nemo2407": 12,
        "nemo_long": 17,
        "bridge": 156,
    }
    second = sum(row.row_id.endswith("(second)") for row in bridge())
    assert len(rows_of("bridge_perf.csv")) == 158 == counts["bridge"] - second + len(left_out())
    assert all("Nemotron_3" in row and "Mamba" in reason for row, reason in left_out().items())
    assert len(left_out()) == 16


def test_no_row_that_was_run_is_refused(measured):
    refused = {}
    for row in measured:
        workload = row.workload
        found = violations(workload.topology, workload.shape, workload.batch)
        if found:
            refused[row.row_id] = ", ".join(sorted({problem.key for problem in found}))
    assert refused == ILLEGAL


def test_layers_lie_on_the_stages_without_one_left_over(measured):
    for row in measured:
        if row.row_id not in ILLEGAL:
            shape = row.workload.shape
            assert sum(row.workload.topology.layers_of_stage(shape.num_layers)) == shape.num_layers


def test_every_row_has_a_name_a_cluster_and_a_time(measured):
    assert len({(row.table, row.row_id) for row in measured}) == len(measured)
    assert {row.cluster for row in measured} <= set(preset_names())
    assert all(0.01 < row.seconds < 1000 for row in measured)


def test_seconds_are_as_published_or_follow_from_the_throughput():
    vtrain = TABLES["vtrain"]()
    assert find(vtrain, "line 2").seconds == 0.372160408
    # 128 sequences of 8,192 on 8 GPUs of 12,273 tokens/s each.
    nemo = find(TABLES["nemo2407"](), "line 12: LLAMA3-8B on 8")
    assert nemo.seconds == pytest.approx(128 * 8192 / (8 * 12273))
    # 512 sequences of 2,048 at 96 s L h^2 (...) each on 32 GPUs of 137 TFLOP/s.
    sc21 = find(TABLES["sc21"](), "line 2: 1.7B")
    bracket = 1 + 2048 / (6 * 2304) + 51200 / (16 * 24 * 2304)
    flops = 512 * 2048 * 96 * 24 * 2304**2 * bracket
    assert sc21.seconds == pytest.approx(flops / (32 * 137e12))


def test_topologies_are_those_of_the_tables():
    """Three rows as the papers have them; sizes that were derived among them."""
    sc21 = find(TABLES["sc21"](), "line 9: 310.1B").workload
    assert (sc21.topology.label, sc21.num_microbatches) == ("TP8 PP16 VPP2 DP15", 144)
    assert sc21.recompute.granularity == "full"
    assert not sc21.fused_attention
    korthikanti = find(TABLES["korthikanti"](), "line 3: 175B present").workload
    assert (korthikanti.topology.label, korthikanti.num_microbatches) == ("TP8 PP8 VPP3 DP1", 64)
    assert korthikanti.topology.sequence_parallel
    assert not find(TABLES["korthikanti"](), "line 3: 175B full").workload.topology.sequence_parallel
    llama = find(bridge(), "line 92: LLAMA3.1_405B MXFP8 DGX-GB200 x 256 26.02").workload
    assert (llama.topology.label, llama.num_microbatches) == ("TP4 PP16 VPP8 DP4", 384)
    assert llama.topology.layers_of_stage(126) == [7, *[8] * 14, 7]


def test_figures_in_parentheses_are_a_second_measurement_with_its_own_topology():
    name = "line 144: LLAMA3_70B FP8 DGX-GB200 x 64 25.09"
    first, second = find(bridge(), name), find(bridge(), f"{name} (second)")
    assert (first.tokens_per_gpu, first.tflops_per_gpu, first.precision) == (3986, 1791, "fp8-cs")
    assert (first.workload.topology.label, first.workload.sharing.zero) == ("DP64", 3)
    assert (second.tokens_per_gpu, second.tflops_per_gpu, second.precision) == (3546, 1593, "mxfp8")
    assert (second.workload.topology.label, second.workload.sharing.zero) == ("TP2 PP4 VPP5 DP8", 1)


def test_experts_are_not_cut_by_tp():
    qwen = find(bridge(), "line 114: Qwen3_235B_a22B FP8 DGX-H100 x 256 26.02").workload.topology
    assert (qwen.tp, qwen.etp, qwen.ep, qwen.expert_dp) == (2, 1, 32, 1)
    assert qwen.layers_of_stage(94) == [11, *[12] * 6, 11]
