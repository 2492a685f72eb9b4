"""The CPU in the place of CUDA: what Megatron asks for is answered, and a real GPU is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from small_jobs import SmallJobs, curve


def devices_of_what_megatron_makes() -> list[str]:
    import torch

    from megaplug.runtime import cpu

    assert cpu.install()
    assert cpu.install(), "a second call changes nothing"
    made = [
        torch.tensor([1.0], device="cuda"),
        torch.empty(2, device=torch.cuda.current_device()),
        torch.zeros(2, device=0),
        torch.ones(2).to("cuda"),
        torch.ones(2).cuda(non_blocking=True),
        torch.empty(2, device=torch.device("cuda:0"), pin_memory=True),
    ]
    return [str(tensor.device) for tensor in made]


def test_whatever_asks_for_cuda_gets_the_cpu(tmp_path: Path) -> None:
    assert run_ranks(1, devices_of_what_megatron_makes, folder=tmp_path) == [["cpu"] * 6]


def states_of_the_random_trackers() -> tuple[bool, bool]:
    import torch
    from megatron.core.tensor_parallel import random

    from megaplug.runtime import cpu

    cpu.install()
    random.initialize_rng_tracker()
    tracker = random.get_cuda_rng_tracker()
    tracker.add("one", 1)
    tracker.add("two", 2)
    saved = {name: state.clone() for name, state in tracker.get_states().items()}
    with tracker.fork("one"):
        first = torch.rand(4)
    with tracker.fork("two"):
        other = torch.rand(4)
    tracker.set_states(saved)
    with tracker.fork("one"):
        again = torch.rand(4)
    return torch.equal(first, again), torch.equal(first, other)


def test_megatrons_random_trackers_keep_their_own_state(tmp_path: Path) -> None:
    assert run_ranks(1, states_of_the_random_trackers, folder=tmp_path) == [(True, False)]


def what_a_lone_rank_asks_of_gloo(store: str) -> tuple[list[str], list[list[float]]]:
    import os

    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    from megaplug.runtime import cpu

    cpu.install()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = [dist.new_group([member]) for member in range(2)][rank]
    sums, gathered, scattered = torch.ones(3), torch.zeros(2), torch.zeros(2)
    with torch.profiler.profile() as profile:
        dist.all_reduce(sums, dist.ReduceOp.SUM, mine)
        assert dist.all_gather_into_tensor(gathered, torch.full((2,), 2.0), group=mine) is None
        with _coalescing_manager(mine, async_ops=True) as handle:
            dist.reduce_scatter_tensor(scattered, torch.full((2,), 3.0), group=mine, async_op=True)
        handle.wait()
        assert dist.all_reduce(sums, group=mine, async_op=True).wait()
    asked = [event.key for event in profile.key_averages() if "gloo" in event.key or "c10d" in event.key]
    together = torch.ones(1)
    dist.all_reduce(together)
    dist.destroy_process_group()
    return asked, [sums.tolist(), gathered.tolist(), scattered.tolist(), together.tolist()]


def test_a_rank_alone_in_its_group_asks_nothing_of_gloo(tmp_path: Path) -> None:
    right = [[1.0, 1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [2.0]]
    assert (
        run_ranks(2, what_a_lone_rank_asks_of_gloo, str(tmp_path / "store"), folder=tmp_path)
        == [([], right)] * 2
    )


def whose_collectives_megatron_calls() -> list[bool]:
    import torch
    from megatron.core.distributed import param_and_grad_buffer as buffers

    from megaplug.runtime import cpu

    gloo_s = torch.distributed.all_gather_into_tensor
    cpu.install()
    ours = torch.distributed
    return [
        ours.all_gather_into_tensor is not gloo_s,
        buffers.dist_all_gather_func is ours.all_gather_into_tensor,
        buffers.dist_reduce_scatter_func is ours.reduce_scatter_tensor,
    ]


def test_megatron_s_buffers_ask_a_lone_rank_s_collectives_though_imported_before(tmp_path: Path) -> None:
    assert run_ranks(1, whose_collectives_megatron_calls, folder=tmp_path) == [[True] * 3]


def what_changes_with_cuda() -> list[str]:
    import torch

    from megaplug.runtime import cpu

    before = dict(vars(torch.cuda)), dict(vars(torch.Tensor))
    torch.cuda.is_available = lambda: True
    assert not cpu.install()
    after = dict(vars(torch.cuda)), dict(vars(torch.Tensor))
    return [
        name
        for old, new in zip(before, after, strict=True)
        for name in new
        if new[name] is not old.get(name) and name != "is_available"
    ]


def test_nothing_is_stood_in_for_where_cuda_is(tmp_path: Path) -> None:
    assert run_ranks(1, what_changes_with_cuda, folder=tmp_path) == [[]]


@pytest.mark.parametrize("attention", ["flash", "local"])
def test_recomputed_layers_find_the_cpu_too(attention: str, small_jobs: SmallJobs) -> None:
    """Recomputation runs forward code inside the backward pass, device literals included."""
    recompute = ["train.recompute_granularity=full", "train.recompute_method=uniform"]
    words = ["train.iters=2", "lr=constant", f"attention={attention}"]
    plain = small_jobs.run([*words, f"name=plain_{attention}"])
    again = small_jobs.run([*words, *recompute, "train.recompute_num_layers=2", f"name=again_{attention}"])
    assert curve(again) == curve(plain)
