"""Sequences that several ranks share: the losses and gradient norms of one rank, through ``pretrain()``.

It also holds that the attentions, Megatron's batches and its rotary angles agree on which rank has which
token: a layout that only one of them has would be another model.
"""

from __future__ import annotations

import pytest
from small_jobs import SmallJobs, curve

FIVE_STEPS = ["train.iters=5", "lr=constant", "lr.lr=1e-3", "model.init_method_std=0.2"]
PARAMS = ["attention.params.segment_lengths=[16,64]", "attention.params.dilation_rates=[1,2]"]
DILATED = ["attention=ring_dilated", *PARAMS]
# Stages of two layers begin in the middle of a unit of three.
MIXED = ["attention.pattern=[ring_dilated,ring,ring]", "attention=ring_dilated", *PARAMS]
RECOMPUTE = ["train.recompute_granularity=selective", "train.recompute_modules=[core_attn]"]
CONTIGUOUS = ["attention.params.token_layout=contiguous"]
CASES = {
    "ring on cp2": (["attention=ring"], ["topology.cp=2"]),
    "ring on pp2 x cp2": (["attention=ring"], ["topology.pp=2", "topology.cp=2"]),
    "dilated on cp4": (DILATED, ["topology.cp=4"]),
    "dilated on tp2 x cp2": (DILATED, ["topology.tp=2", "topology.cp=2"]),
    "contiguous ring on cp2": (["attention=ring", *CONTIGUOUS], ["topology.cp=2"]),
    "contiguous dilated on cp4": ([*DILATED, *CONTIGUOUS], ["topology.cp=4"]),
    "dilated and dense layers on cp2": (MIXED, ["topology.cp=2"]),
    "dilated and dense layers on pp2": (MIXED, ["topology.pp=2"]),
    "dilated on cp2, computed again": (DILATED, ["topology.cp=2", *RECOMPUTE]),
}


@pytest.fixture(scope="module")
def start(small_jobs: SmallJobs):
    """The words that load one checkpoint, and the curves on one rank of each attention."""
    first = small_jobs.run([*FIVE_STEPS, "name=cp_first", "train.iters=2"])
    load = [*FIVE_STEPS, f"load={first.path}"]
    names = {
        "attention=flash": ["attention=flash"],
        "attention=ring": ["attention=ring"],
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
@pytest.mark.parametrize("name", CASES)
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
