"""What one rank of a world of fake ranks is told where torch would ask others, or move numbers."""

from __future__ import annotations

import functools
from typing import Any

import torch


def install(rank: int) -> None:
    """Answer for the other ranks; all of them hold what this one holds.

    Args:
        rank: This one's number in the world.
    """
    distributed: Any = torch.distributed
    distributed.new_group = _only_own_groups(rank, distributed.new_group)
    distributed.batch_isend_irecv = _one_by_one
    distributed.all_gather_object = _same_everywhere
    namespace: Any = torch
    namespace.tensor = _of_numbers(torch.tensor)


def _only_own_groups(rank: int, real: Any) -> Any:
    """Groups that the rank is not in need not be made: thousands, in a large world. Gloo's are fake, too."""

    @functools.wraps(real)
    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return torch.distributed.GroupMember.NON_GROUP_MEMBER
        return real(ranks, *args, **{**kwargs, "backend": None})

    return new_group


def _one_by_one(operations: Any) -> list[Any]:
    """Torch asks for the backend of the tensors' device, and there is none for this one."""
    return [each.op(each.tensor, each.peer, each.group, each.tag) for each in operations]


def _same_everywhere(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = [obj] * len(object_list)


def _of_numbers(real: Any) -> Any:
    """``torch.tensor`` of tensors reads their numbers past every dispatch mode; of a number keeps it."""

    @functools.wraps(real)
    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        numbers = _numbers(data)
        made = real(numbers, *args, **kwargs)
        assert isinstance(made, torch.Tensor)
        if made.numel() == 1:
            # Every rank says the same: a flag is what it was before it is reduced.
            while isinstance(numbers, list):
                numbers = numbers[0]
            made.__dict__["known_number"] = numbers
        return made

    return tensor


def _numbers(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_numbers(item) for item in data]
    return data.item() if isinstance(data, torch.Tensor) else data
