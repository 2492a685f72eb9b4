"""Sequences that several ranks share: the losses and gradient norms of one rank, through ``pretrain()``.

Tolerance 1e-5 relative in fp32, as for the other topologies (``test_topologies_agree.py`` says why). It also
holds that the attentions, Megatron's batches and its rotary angles agree on which rank has which
token: a layout that only one of them has would be another model.
"""

from __future__ import annotations

import pytest
from small_jobs import SmallJobs, curve

FIVE_STEPS = ["train.iters=5", "lr=constant", "lr.lr=1e-3", "model.init_method_std=0.2"]
PARAMS = ["attention.params.segment_lengths=[16,64]", "attention.params.dilation_rates=[1,2]"]
RING, DILATED = ["attention=ring"], ["attention=ring_dilated", *PARAMS]
# Stages of two layers begin in the middle of a unit of three.
MIXED = ["attention.pattern=[ring_dilated,ring,ring]", "attention=ring_dilated", *PARAMS]
BLOCKS = ["attention.params.block_size=8", "attention.pattern_params.ring.block_size=5"]
CONTIGUOUS = ["attention.params.token_layout=contiguous"]
SELECTIVE = ["train.recompute_granularity=selective", "train.recompute_modules=[core_attn]"]
FULL = [
    "train.recompute_granularity=full",
    "train.recompute_method=uniform",
    "train.recompute_num_layers=1",
]
TOPOLOGIES = {
    "cp2": ["topology.cp=2"],
    "cp4": ["topology.cp=4"],
    "tp2 x cp2": ["topology.tp=2", "topology.cp=2"],
    "pp2 x cp2": ["topology.pp=2", "topology.cp=2"],
}
CASES = {
    **{f"ring on {name}": (RING, words) for name, words in TOPOLOGIES.items()},
    **{f"dilated on {name}": (DILATED, words) for name, words in TOPOLOGIES.items()},
    "contiguous ring on cp2": ([*RING, *CONTIGUOUS], TOPOLOGIES["cp2"]),
    "contiguous dilated on cp4": ([*DILATED, *CONTIGUOUS], TOPOLOGIES["cp4"]),
    "ring on cp2, computed again": (RING, [*TOPOLOGIES["cp2"], *SELECTIVE]),
    "dilated on cp2, computed again": (DILATED, [*TOPOLOGIES["cp2"], *SELECTIVE]),
    "ring on cp2, layers computed again": (RING, [*TOPOLOGIES["cp2"], *FULL]),
    "dilated on cp2, layers computed again": (DILATED, [*TOPOLOGIES["cp2"], *FULL]),
    "dilated and dense layers on cp2": (MIXED, [*TOPOLOGIES["cp2"], *BLOCKS]),
    "dilated and dense layers on pp2": (MIXED, ["topology.pp=2"]),
}
# What others of these show as well, with more of it at a time.
SOAK = (
    "ring on cp2", "dilated on cp2", "ring on pp2 x cp2", "dilated on tp2 x cp2", "contiguous ring on cp2",
    "ring on cp2, computed again", "dilated on cp2, layers computed again",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(small_jobs: SmallJobs):
    """The words that load one checkpoint, and the curves on one rank of each attention."""
    first = small_jobs.run([*FIVE_STEPS, "name=cp_first", "train.iters=2"])
    load = [*FIVE_STEPS, f"load={first.path}"]
    names = {
        "attention=flash": ["attention=flash"],
        "attention=ring": RING,
        DILATED[0]: DILATED,
        MIXED[0]: MIXED,
    }
    alone = {
        key: curve(small_jobs.run([*load, f"name=cp1_{number}", *words]))
        for number, (key, words) in enumerate(names.items())
    }
    return load, alone


def largest_difference(found, expected):
    assert len(found) == len(expected) == 5
    return max(abs(a - b) / abs(b) for a, b in zip(sum(found, ()), sum(expected, ()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in SOAK else name for name in CASES]
)
def test_loss_and_gradient_norm_equal_those_of_one_rank(name, small_jobs: SmallJobs, start):
    load, alone = start
    attention, topology = CASES[name]
    run = small_jobs.run([*load, f"name=cp_{list(CASES).index(name)}", *attention, *topology])
    assert largest_difference(curve(run), alone[attention[0]]) < 1e-5


@pytest.mark.slow
def test_on_one_rank_ring_is_flash_and_dilated_is_not(start):
    _, alone = start
    assert largest_difference(alone["attention=ring"], alone["attention=flash"]) < 1e-5
    assert largest_difference(alone["attention=ring_dilated"], alone["attention=flash"]) > 1e-4
    for all_alike in ("attention=ring", "attention=ring_dilated"):
        assert largest_difference(alone[MIXED[0]], alone[all_alike]) > 1e-4


@pytest.mark.slow
def test_a_norm_over_all_heads_is_that_of_one_rank_where_two_share_them(small_jobs: SmallJobs):
    """From one checkpoint of one rank, whose norm two ranks then hold in halves."""
    normed = [*MIXED, "attention.sub_layer_norm=true", "attention.gamma_init=1.5"]
    steps = [step for step in FIVE_STEPS if "init_method" not in step]
    first = small_jobs.run([*steps, *normed, "name=norm_first", "train.iters=2"])
    load = [*steps, *normed, f"load={first.path}"]
    alone = curve(small_jobs.run([*load, "name=norm_alone"]))
    shared = curve(small_jobs.run([*load, "name=norm_tp2", "topology=tp2_sp"]))
    assert largest_difference(shared, alone) < 1e-5
