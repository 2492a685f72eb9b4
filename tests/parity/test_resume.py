"""A run that is stopped and continued is the run that was never stopped."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from small_jobs import SmallJobs, curve, state, validations

from megaplug.runs.folder import RunFolder

TWENTY = ["train.iters=20", "lr=cosine", "lr.lr=1e-3", "train.eval_iters=1", "train.eval_interval=7"]
# Whoever draws a random number more or less than the undisturbed run is seen in the losses.
DROPOUT = ["model.hidden_dropout=0.1", "attention=local", "model.attention_dropout=0.1"]
LAYOUTS = {
    "one": [],
    "dp2": ["topology.dp=2"],
    "tp2_pp2": ["topology.tp=2", "topology.pp=2"],
}


@pytest.fixture(scope="module")
def undisturbed(small_jobs: SmallJobs) -> Callable[..., RunFolder]:
    """The run of twenty steps that nobody stops; made once for all tests that compare with it."""
    return functools.cache(lambda *words: small_jobs.run([*TWENTY, *words, "name=undisturbed"]))


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        # The fullest is in every change's tests: bf16 has dropout, too.
        ("dp2", "bf16"),
        pytest.param("one", "fp32", marks=pytest.mark.slow),
        pytest.param("one", "bf16", marks=pytest.mark.soak),
        pytest.param("dp2", "fp32", marks=pytest.mark.soak),
        pytest.param("tp2_pp2", "fp32", marks=pytest.mark.slow),
        pytest.param("tp2_pp2", "bf16", marks=pytest.mark.soak),
    ],
)
def test_stopped_at_ten_and_continued_equals_undisturbed_bit_for_bit(
    layout: str, precision: str, small_jobs: SmallJobs, undisturbed: Callable[..., RunFolder]
) -> None:
    words = [*LAYOUTS[layout], f"precision={precision}", *(DROPOUT if precision == "bf16" else [])]
    whole = undisturbed(*words)
    parts = [*TWENTY, *words, f"name={layout}_{precision}_parts"]
    stopped = small_jobs.run([*parts, "train.stop_at=10"])
    assert (state(stopped).status, state(stopped).iteration) == ("stopped", 10)
    continued = small_jobs.run(parts)
    assert continued.path == stopped.path
    assert state(continued).status == "finished"
    assert curve(continued) == curve(whole)
    assert len(curve(continued)) == 20
    assert validations(continued) == validations(whole)
    assert [iteration for iteration, _ in validations(continued)] == [7, 14, 20]


# From, to, and what both are: the layouts between which Megatron can reshard the whole state.
RESHARDED = {
    "dp2_to_dp1": ([], ["topology.dp=2"], ["topology.dp=1"]),
    "dp2_to_tp2_dp2": ([], ["topology.dp=2"], ["topology.tp=2", "topology.dp=2"]),
    "ep2_to_ep4": (
        ["moe=small", "moe.moe_ffn_hidden_size=64"],
        ["topology.ep=2", "topology.dp=2"],
        ["topology.ep=4", "topology.dp=4"],
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dp2_to_dp1", marks=pytest.mark.soak),
        pytest.param("dp2_to_tp2_dp2", marks=pytest.mark.slow),
        pytest.param("ep2_to_ep4", marks=pytest.mark.slow),
    ],
)
def test_the_whole_state_continues_under_another_topology(
    name: str, small_jobs: SmallJobs, undisturbed: Callable[..., RunFolder]
) -> None:
    """Within 1e-5: as bitwise as sums in another order can be, see ``test_topologies_agree``."""
    model, before, after = RESHARDED[name]
    words = [*TWENTY, *model, "precision=fp32"]
    whole = curve(undisturbed(*model, *before, "precision=fp32"))
    stopped = small_jobs.run([*words, *before, f"name={name}_stopped", "train.stop_at=10"])
    moved = small_jobs.run([*words, *after, f"name={name}", f"load={stopped.path}", "load_state=all"])
    found = curve(moved)
    assert len(found) == 10
    pairs = zip(sum(found, ()), sum(whole[10:], ()), strict=True)
    assert max(abs(one - other) / abs(other) for one, other in pairs) < 1e-5


@pytest.mark.slow
def test_stock_megatron_continues_wrongly_without_a_word(
    small_jobs: SmallJobs, undisturbed: Callable[..., RunFolder]
) -> None:
    words = [*TWENTY, "topology.dp=2", "name=stock"]
    small_jobs.run([*words, "train.stop_at=10"])
    continued = curve(small_jobs.run(words, skip_repairs=frozenset({"adam-step-per-parameter"})))
    right = curve(undisturbed("topology.dp=2", "precision=fp32"))
    assert continued[:11] == right[:11]
    assert max(abs(one[0] - other[0]) for one, other in zip(continued, right, strict=True)) > 1e-3
