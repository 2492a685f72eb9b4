"""What data-parallel ranks share out decides nothing: one rank's numbers under every level, also resumed.

Tolerance 1e-5 relative in fp32, as in ``test_topologies_agree``: reductions sum in another order.
"""

from __future__ import annotations

import planted_faults as faults
import pytest
from small_jobs import SmallJobs, curve, state

from megaplug.errors import UserError
from megaplug.runs.folder import RunFolder

TOLERANCE = 1e-5
SIX_STEPS = ["train.iters=6", "lr=constant", "lr.lr=1e-3"]
LEVELS = {
    "zero0": ["topology.dp=2", "topology.zero=0"],
    "torch_zero2": ["topology.dp=2", "topology.zero=2", "topology.fsdp=torch"],
    "torch_zero3": ["topology.dp=2", "topology.zero=3", "topology.fsdp=torch"],
}


@pytest.fixture(scope="module")
def first(small_jobs: SmallJobs) -> RunFolder:
    """Two steps of one rank, from whose weights all others go on."""
    return small_jobs.run(["name=sharding_first", "train.iters=2"])


@pytest.fixture(scope="module")
def one_rank(small_jobs: SmallJobs, first: RunFolder) -> list[tuple[float, float]]:
    return curve(small_jobs.run([*SIX_STEPS, "name=sharding_one", f"load={first.path}"]))


def difference(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    assert len(found) == len(expected) == 6
    pairs = zip(sum(found, ()), sum(expected, ()), strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)


@pytest.mark.parametrize(
    "name",
    [
        "torch_zero3",
        pytest.param("zero0", marks=pytest.mark.slow),
        pytest.param("torch_zero2", marks=pytest.mark.slow),
    ],
)
def test_it_agrees_with_one_rank_and_continues_bit_for_bit(
    name: str, small_jobs: SmallJobs, first: RunFolder, one_rank: list[tuple[float, float]]
) -> None:
    words = [*SIX_STEPS, *LEVELS[name], f"load={first.path}"]
    whole = curve(small_jobs.run([*words, f"name={name}_whole"]))
    assert difference(whole, one_rank) < TOLERANCE
    stopped = small_jobs.run([*words, f"name={name}_parts", "train.stop_at=3"])
    assert (state(stopped).status, state(stopped).iteration) == ("stopped", 3)
    assert curve(small_jobs.run([*words, f"name={name}_parts"])) == whole


@pytest.mark.soak
@pytest.mark.parametrize("name", LEVELS)
def test_ranks_that_read_the_same_data_are_noticed(
    name: str, small_jobs: SmallJobs, first: RunFolder, one_rank: list[tuple[float, float]]
) -> None:
    words = [*SIX_STEPS, *LEVELS[name], f"name={name}_broken", f"load={first.path}"]
    broken = curve(small_jobs.run(words, plant=faults.ranks_read_the_same_data))
    assert difference(broken, one_rank) > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch_zero3", pytest.param("zero0", marks=pytest.mark.soak)])
def test_bf16_continues_bit_for_bit(name: str, small_jobs: SmallJobs) -> None:
    words = [*SIX_STEPS, *LEVELS[name], "precision=bf16"]
    whole = curve(small_jobs.run([*words, f"name={name}_bf16_whole"]))
    small_jobs.run([*words, f"name={name}_bf16_parts", "train.stop_at=3"])
    assert curve(small_jobs.run([*words, f"name={name}_bf16_parts"])) == whole


def test_a_state_that_cannot_be_resharded_is_refused_before_the_start(
    small_jobs: SmallJobs, first: RunFolder
) -> None:
    words = [*SIX_STEPS, f"load={first.path}", "load_state=all"]
    for level, typed in (("zero0", "topology.zero=0"), ("torch_zero3", "topology.fsdp=torch")):
        with pytest.raises(UserError) as refused:
            small_jobs.freeze([*words, *LEVELS[level]])
        assert "topology.zero=1" in str(refused.value) and typed in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["fsdp2-local-shards", "fsdp2-adam-step"])
def test_without_its_repair_fsdp2_cannot_continue(repair: str, small_jobs: SmallJobs) -> None:
    words = [*SIX_STEPS, *LEVELS["torch_zero3"], f"name={repair}"]
    skipped = frozenset({repair})
    with pytest.raises(AssertionError, match=r"does not match any model|KeyError: 'step'"):
        small_jobs.run([*words, "train.stop_at=2"], skip_repairs=skipped)
        small_jobs.run(words, skip_repairs=skipped)
