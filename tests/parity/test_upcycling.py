"""A dense checkpoint made experts of: the mixture begins as the dense model.

Where a token's experts together are the dense MLP and their weights sum to 1, the output is the same.
Tolerance 1e-6 relative in fp32: what experts give is added up, which rounds the last digit otherwise; in bf16
1e-3.
"""

from __future__ import annotations

import pytest
from small_jobs import SmallJobs, curve

MOE = ["moe=small", "moe.num_experts=4", "moe.moe_router_topk=2", "moe.moe_ffn_hidden_size=128"]
# The activation that a scaled weight only scales, so that the scaled parts of an MLP sum to all of it.
SQUARED = ["model.swiglu=false", "model.squared_relu=true"]
HALVES = [*MOE, "moe.num_experts=8", "moe.moe_router_topk=4", "moe.moe_ffn_hidden_size=64"]
BIASES = ["model.add_bias_linear=true", "model.swiglu=false"]
SP = "topology.sequence_parallel=true"
# name: the dense model, its experts, and under which layout they are made.
CASES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "one rank": ([], MOE, []),
    "EP2": ([], MOE, ["topology.ep=2", "topology.dp=2"]),
    "SequentialMLP": ([], [*MOE, "moe.experts=sequential"], []),
    "some layers": ([], [*MOE, "moe.layers=[2,4]"], []),
    "halves of the MLP": (SQUARED, HALVES, []),
    "biases": (BIASES, MOE, []),
    "TP2 ETP2": ([], MOE, ["topology.tp=2", SP]),
    "TP2 EP2 ETP1": ([], MOE, ["topology.tp=2", "topology.ep=2", "topology.etp=1", SP]),
    "DP2 ETP2": ([], MOE, ["topology.dp=2", "topology.etp=2"]),
    "biases at TP2 ETP1": (BIASES, MOE, ["topology.tp=2", "topology.etp=1", SP]),
    "PP2 VPP2": ([], MOE, ["topology.pp=2", "topology.vpp=2"]),
    "bf16": (["precision=bf16"], MOE, ["topology.ep=2", "topology.dp=2"]),
}
QUICK = ("one rank",)
# Each alone what those above have together, or in another number format.
SOAK = ("TP2 ETP2", "DP2 ETP2", "biases at TP2 ETP1", "bf16")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in QUICK else [pytest.mark.soak if name in SOAK else pytest.mark.slow]
        )
        for name in CASES
    ],
)
def test_a_mixture_begins_with_the_loss_of_the_dense_model(name, small_jobs: SmallJobs):
    dense, experts, layout = CASES[name]
    words = [*dense, "lr=constant", "lr.lr=1e-3"]
    first = small_jobs.run([*words, "name=dense", "train.iters=2"])
    on = [*words, "train.iters=3", f"load={first.path}"]
    expected = curve(small_jobs.run([*on, "name=on"]))
    found = curve(small_jobs.run([*on, *experts, *layout, "load_state=upcycle", "name=upcycled"]))
    assert found[0][0] == pytest.approx(expected[0][0], rel=1e-3 if name == "bf16" else 1e-6)
    # It was no model that has not learned yet, and it learns on.
    assert found[0][0] < curve(first)[0][0] and found[-1][0] < found[0][0]


@pytest.mark.slow
def test_an_upcycled_run_goes_on_from_its_own_checkpoint(small_jobs: SmallJobs):
    first = small_jobs.run(["name=first", "train.iters=2"])
    words = [*MOE, f"load={first.path}", "load_state=upcycle", "train.iters=4"]
    whole = curve(small_jobs.run([*words, "name=whole"]))
    small_jobs.run([*words, "name=parts", "train.stop_at=2"])
    assert curve(small_jobs.run([*words, "name=parts"])) == whole
