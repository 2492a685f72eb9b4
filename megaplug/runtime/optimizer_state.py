"""What the distributed optimizer holds, for a checkpoint on a CPU; copied once where ranks share it.

Megatron makes the whole state on every rank through five copies of it (``get_parameter_state_dp_zero`` of
0.19). It also puts what follows a bucket that was filled up at its end elsewhere than it then reads it from.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def install() -> None:
    """Put it in the place of Megatron's, for saving; what is loaded into is still made by Megatron."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    real = DistributedOptimizer.get_parameter_state_dp_zero

    @functools.wraps(real)
    def get_parameter_state_dp_zero(
        self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> Any:
        if empty_data or use_gloo_comm or not return_on_all_ranks:
            return real(self, use_gloo_comm, empty_data, return_on_all_ranks)
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, ranges in enumerate(self.gbuf_ranges):
            ((dtype, buckets),) = ranges.items()
            state[index] = {dtype: _states(self, self.buffers[index], buckets)}
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = get_parameter_state_dp_zero


class Pieces:
    """Flat tensors by the range of a buffer that they stand for.

    Args:
        pieces: By the first and the last but one element.
    """

    def __init__(self, pieces: dict[tuple[int, int], torch.Tensor]) -> None:
        self._pieces = pieces

    def __getitem__(self, range_: slice) -> torch.Tensor:
        return self._pieces[range_.start, range_.stop]


def _states(optimizer: Any, buffer: Any, buckets: list[Any]) -> dict[str, Any]:
    """By the name of a state, something that gives a parameter's state for the parameter's range."""
    keys = ("param", *optimizer.optimizer_state_keys)
    group = optimizer.data_parallel_group
    found: dict[str, Any] = {"numel_unpadded": buffer.numel_unpadded}
    if group.size() == 1:
        pieces: dict[str, dict[tuple[int, int], torch.Tensor]] = {key: {} for key in keys}
        for bucket in buckets:
            for param in bucket["param_map"]:
                tensors = optimizer._get_main_param_and_optimizer_states(param)
                start, end, _ = buffer.param_index_map[param]
                for key in keys:
                    pieces[key][start, end] = tensors[key].detach().view(-1).float()
        return found | {key: Pieces(pieces[key]) for key in keys}
    # Zeros between parameters are nobody's.
    for key in keys:
        found[key] = torch.empty(buffer.numel, dtype=torch.float32)
    for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
        size = bucket.grad_data.numel()
        local = torch.zeros(size // group.size(), dtype=torch.float32)
        states = [
            (held["gbuf_local"], optimizer._get_main_param_and_optimizer_states(param))
            for param, held in ranges["param_map"].items()
        ]
        for key in keys:
            for place, tensors in states:
                local[place.start : place.end].copy_(tensors[key].detach())
            whole = found[key][bucket.offset : bucket.offset + size]
            torch.distributed.all_gather_into_tensor(whole, local, group)
    return found
