"""One checkpoint of one rank, trained on for five steps under every kind of parallelism: the same numbers.

Tolerance 1e-5 relative in fp32: the sums of a matrix product or a reduction come in another order on other
ranks, which moves the last one or two of fp32's seven digits; five steps of Adam do not make more of it.
"""

from __future__ import annotations

from collections.abc import Callable

import planted_faults as faults
import pytest
from small_jobs import SmallJobs, curve

from megaplug.runs.folder import RunFolder

TOLERANCE = 1e-5
DENSE: list[str] = []
MOE = ["moe=small", "moe.moe_ffn_hidden_size=64"]
LATENT = [
    # Attention that is far from even: a wrong gradient of the keys shows.
    "model.init_method_std=0.2",
    "model.multi_latent_attention=true",
    "model.rope_type=rope",
    "model.num_query_groups=4",
    "model.qk_layernorm=true",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=24",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=12",
]
# Weights come from the rank that has updated them layer by layer, as those of large models do: what does not
# wait for its own computes with old ones.
OWN_BUCKETS = ["megatron.ddp_bucket_size=4000"]
FIVE_STEPS = ["train.iters=5", "lr=constant", "lr.lr=1e-3"]

# name: what the job is, what its overrides are, and a fault that the test must not miss.
CASES: dict[str, tuple[list[str], list[str], Callable[[], None]]] = {
    "tp2": (
        DENSE,
        ["topology.tp=2", "topology.sequence_parallel=false"],
        faults.row_parallel_does_not_reduce,
    ),
    "tp2_sp": (DENSE, ["topology.tp=2", "topology.sequence_parallel=true"], faults.norms_are_not_marked),
    "pp2": (DENSE, ["topology.pp=2"], faults.activations_arrive_changed),
    "pp2_vpp2": (DENSE, ["topology.pp=2", "topology.vpp=2"], faults.activations_arrive_changed),
    "dp2": (DENSE, ["topology.dp=2", *OWN_BUCKETS], faults.parameters_are_not_waited_for),
    "dp2_without_overlap": (DENSE, ["topology.dp=2", "overlap=off"], faults.ranks_read_the_same_data),
    "tp2_pp2_sp": (
        DENSE,
        ["topology.tp=2", "topology.pp=2", "topology.sequence_parallel=true"],
        faults.norms_are_not_marked,
    ),
    "full_recompute": (
        DENSE,
        [
            "train.recompute_granularity=full",
            "train.recompute_method=uniform",
            "train.recompute_num_layers=1",
        ],
        faults.recomputation_differs,
    ),
    "moe_ep2_allgather": (
        MOE,
        ["topology.ep=2", "topology.dp=2", "moe.moe_token_dispatcher_type=allgather"],
        faults.experts_are_swapped,
    ),
    "moe_ep2_alltoall": (
        MOE,
        ["topology.ep=2", "topology.dp=2", "moe.moe_token_dispatcher_type=alltoall"],
        faults.experts_are_swapped,
    ),
    "moe_ep4": (MOE, ["topology.ep=4", "topology.dp=4"], faults.experts_are_swapped),
    "moe_ep4_allgather": (
        MOE,
        ["topology.ep=4", "topology.dp=4", "moe.moe_token_dispatcher_type=allgather"],
        faults.experts_are_swapped,
    ),
    "moe_etp2": (
        MOE,
        ["topology.tp=2", "topology.etp=2", "topology.sequence_parallel=true"],
        faults.experts_are_swapped,
    ),
    "moe_etp2_allgather": (
        MOE,
        ["topology.dp=2", "topology.etp=2", "moe.moe_token_dispatcher_type=allgather"],
        faults.experts_are_swapped,
    ),
    "moe_tp2_ep2": (
        MOE,
        ["topology.tp=2", "topology.ep=2", "topology.etp=1", "topology.sequence_parallel=true"],
        faults.experts_are_swapped,
    ),
    # Two ranks have the same experts, and half of their optimizer each.
    "moe_tp2_etp1": (
        MOE,
        ["topology.tp=2", "topology.etp=1", "topology.sequence_parallel=true", *OWN_BUCKETS],
        faults.parameters_are_not_waited_for,
    ),
    "moe_tp2_etp1_activation_again": (
        [*MOE, "model.squared_relu=true", "model.swiglu=false"],
        [
            "topology.tp=2",
            "topology.etp=1",
            "topology.sequence_parallel=true",
            *OWN_BUCKETS,
            "train.recompute_granularity=selective",
            "train.recompute_modules=[moe_act]",
        ],
        faults.parameters_are_not_waited_for,
    ),
    "moe_biases_tp2_ep2": (
        [*MOE, "model.add_bias_linear=true"],
        ["topology.tp=2", "topology.ep=2", "topology.etp=1", "topology.sequence_parallel=true"],
        faults.experts_of_other_ranks_are_summed,
    ),
    "moe_pp2_ep2": (MOE, ["topology.pp=2", "topology.dp=2", "topology.ep=2"], faults.experts_are_swapped),
    "moe_sequential": (
        MOE,
        ["moe.experts=sequential", "topology.ep=2", "topology.dp=2"],
        faults.sequential_experts_are_swapped,
    ),
    "moe_activation_again": (
        MOE,
        ["train.recompute_granularity=selective", "train.recompute_modules=[moe_act]"],
        faults.experts_are_swapped,
    ),
    "latent_tp2_sp": (
        LATENT,
        ["topology.tp=2", "topology.sequence_parallel=true"],
        faults.rotated_keys_are_not_summed,
    ),
}


QUICK = ("dp2", "tp2_pp2_sp", "moe_ep2_alltoall")
# One of a kind is enough for a fault.
PLANTED = (
    *QUICK, "tp2", "tp2_sp", "pp2", "pp2_vpp2", "dp2_without_overlap", "full_recompute", "moe_ep2_allgather",
    "latent_tp2_sp", "moe_etp2", "moe_sequential",
)  # fmt: skip


@pytest.fixture(scope="session")
def start(small_jobs: SmallJobs) -> Callable[[list[str]], tuple[RunFolder, list[tuple[float, float]]]]:
    """The checkpoint of a model that one rank has trained for two steps, and how one rank goes on from it."""
    known: dict[str, tuple[RunFolder, list[tuple[float, float]]]] = {}

    def make(model: list[str]) -> tuple[RunFolder, list[tuple[float, float]]]:
        key = " ".join(model)
        if key not in known:
            first = small_jobs.run([*model, "name=first", "train.iters=2"])
            on_one_rank = small_jobs.run([*model, *FIVE_STEPS, "name=one", f"load={first.path}"])
            known[key] = first, curve(on_one_rank)
        return known[key]

    return make


def largest_difference(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    assert len(found) == len(expected) == 5
    pairs = zip(sum(found, ()), sum(expected, ()), strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_loss_and_gradient_norm_equal_those_of_one_rank(
    name: str, small_jobs: SmallJobs, start: Callable
) -> None:
    model, topology, _ = CASES[name]
    first, expected = start(model)
    run = small_jobs.run([*model, *FIVE_STEPS, f"name={name}", *topology, f"load={first.path}"])
    assert largest_difference(curve(run), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "words"),
    [
        pytest.param(DENSE, ["topology.dp=2"], id="dense"),
        pytest.param(MOE, ["topology.dp=2", "topology.ep=2"], id="experts", marks=pytest.mark.slow),
    ],
)
def test_the_distributed_optimizer_equals_megatrons_plain_one(
    model: list[str], words: list[str], small_jobs: SmallJobs, start: Callable
) -> None:
    first, expected = start(model)
    run = small_jobs.run(
        [*model, *FIVE_STEPS, "name=plain_optimizer", *words, "overlap=off", f"load={first.path}"],
        without=["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
    )
    assert largest_difference(curve(run), expected) < TOLERANCE


@pytest.mark.soak
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_not_missed(name: str, small_jobs: SmallJobs, start: Callable) -> None:
    model, topology, fault = CASES[name]
    first, expected = start(model)
    words = [*model, *FIVE_STEPS, f"name={name}_broken", *topology, f"load={first.path}"]
    run = small_jobs.run(words, plant=fault)
    assert largest_difference(curve(run), expected) > 10 * TOLERANCE
