"""Every figure of a run against a value that was come by in another way."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

import known_values
import pytest
from known_values import noted
from small_jobs import SmallJobs, curve, steps

WORDS = ["lr=constant", "attention=local"]


@pytest.fixture(scope="module")
def known(small_jobs: SmallJobs, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """Each step of one rank: what it reports, and what was counted beside it."""
    place = tmp_path_factory.mktemp("known")
    plant = functools.partial(known_values.count_and_compute, str(place))
    words = [*WORDS, "train.iters=4", "name=known", "logging.log_params_norm=true", "logging.peak_tflops=0.5"]
    folder = small_jobs.run(words, plant=plant)
    return list(zip(steps(folder), noted(place), strict=True))


def test_flops_are_those_that_torch_counts(known: list[tuple[Any, Any]]) -> None:
    """Torch counts the whole square of scores, the convention only what a causal mask leaves: by hand.

    4 layers, hidden 64, 4 heads of 16 with 2 groups, FFN 128, s 64, 8 sequences, vocabulary 384 with padding.
    """
    linear = 4 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 64 * 384
    square, causal = 2 * 64 * 64, 2 * 64 * 65 / 2
    tokens = 8 * 64
    for line, counted in known:
        assert counted["flops"] == 3 * 2 * tokens * (linear + 4 * square)
        by_hand = 3 * 2 * tokens * (linear + 4 * causal)
        assert line["tflops"] * line["seconds"] * 1e12 == pytest.approx(by_hand, rel=1e-9)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)


def test_norms_are_those_of_all_elements(known: list[tuple[Any, Any]]) -> None:
    """fp32 sums in another order than fp64: 1e-6."""
    for line, counted in known:
        assert line["params_norm"] == pytest.approx(counted["params_norm"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(counted["grad_norm"], rel=1e-6)


def test_peak_memory_is_the_resident_set_that_psutil_sees(known: list[tuple[Any, Any]]) -> None:
    """The second step holds 400 MiB more for a moment; a peak never comes down."""
    (first, _), (second, allocated) = known[:2]
    assert second["memory_peak_bytes"] == pytest.approx(allocated["resident"], rel=0.05)
    assert second["memory_peak_bytes"] - first["memory_peak_bytes"] > 0.7 * known_values.ALLOCATED
    # The kernel's own count of the peak may lack the last few pages.
    assert all(line["memory_peak_bytes"] > 0.99 * allocated["resident"] for line, _ in known[1:])


def test_steps_take_the_time_of_the_wall(known: list[tuple[Any, Any]]) -> None:
    wall = known[-1][1]["wall"] - known[0][1]["wall"]
    seconds = sum(line["seconds"] for line, _ in known[1:])
    assert seconds == pytest.approx(wall, rel=0.1)
    assert all(line["tokens_per_second"] == pytest.approx(8 * 64 / line["seconds"]) for line, _ in known)


def test_what_is_not_there_is_absent_and_not_zero(known: list[tuple[Any, Any]]) -> None:
    absent = {"gpu_utilization", "memory_reserved_bytes", "slowest_rank", "loss_scale", "skipped"}
    for line, _ in known:
        assert not absent & set(line)
        assert not [name for name in line if name.startswith("communication_")]


def test_a_slow_loader_and_a_slow_rank_are_found(small_jobs: SmallJobs) -> None:
    """Four micro-batches a step wait on rank 1; rank 0 waits for it, and the mean of both is half of that."""
    words = [*WORDS, "train.iters=6", "topology.dp=2", "name=slow_loader"]
    lines = steps(small_jobs.run(words, plant=known_values.rank_1_waits_for_its_data))
    delay = 4 * known_values.BATCH_DELAY_S

    def typical(name: str) -> float:
        """The median of all steps but the first: a busy machine delays either rank by more."""
        return statistics.median(line[name] for line in lines[1:])

    assert delay <= typical("data_seconds") < 1.3 * delay
    assert {line["slowest_rank"] for line in lines[1:]} == {1}
    assert 0.5 * delay < typical("slowest_rank_behind_seconds") < 1.4 * delay
    assert 0.3 * delay < typical("communication_dp_seconds") < 0.8 * delay


@pytest.mark.slow
def test_a_slow_network_is_found_in_its_group(small_jobs: SmallJobs, tmp_path: Path) -> None:
    plant = functools.partial(known_values.slow_network_of_tensor_parallelism, str(tmp_path))
    words = [*WORDS, "train.iters=6", "train.global_batch_size=2", "topology.tp=2", "name=slow_network"]
    folder = small_jobs.run(words, plant=plant)
    calls = {line["calls"] for line in noted(tmp_path)}
    assert len(calls) == 1 and min(calls) >= 4
    delay = min(calls) * known_values.CALL_DELAY_S
    lines = steps(folder)[1:]
    assert delay < min(line["communication_tp_seconds"] for line in lines) < 1.9 * delay
    assert min(line["communication_other_seconds"] for line in lines) < 0.2 * delay
    # Looking does not change what is seen.
    plain = small_jobs.run([*words, "name=not_looked_at", "logging.communication=false"])
    assert curve(plain) == curve(folder)
    assert not [name for name in steps(plain)[0] if name.startswith(("communication_", "slowest_"))]


def test_ranks_exchange_figures_only_where_it_is_logged(small_jobs: SmallJobs) -> None:
    words = [*WORDS, "train.iters=4", "logging.log_interval=2", "name=seldom"]
    lines = steps(small_jobs.run(words))
    assert ["memory_peak_bytes" in line for line in lines] == [False, True, False, True]
    assert all("tflops" in line for line in lines)
