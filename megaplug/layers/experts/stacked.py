"""The linear layers of all experts of a rank as one, with Megatron's initial values and checkpoint keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor, nn

from megaplug.layers.experts.grouped_linear import choose_kernel

# What Megatron's optimizer, gradient reduction and checkpoints ask of a parameter. Not ``sequence_parallel``,
# which RowParallelLinear puts on its bias: each rank has its own experts, and all rows of them.
_ATTRIBUTES = ("allreduce", "tensor_model_parallel", "partition_stride")


class StackedLinear(nn.Module):
    """One weight ``[E, N, K]`` (and bias ``[E, N]``) for the experts of a rank.

    It has to be called before they are read: Megatron waits before the forward pass of a module until its
    parameters have come from the ranks that have updated them (``overlap_param_gather``).

    Args:
        num_experts: E, of this rank.
        kernel: See ``grouped_linear``.
    """

    def __init__(self, num_experts: int, kernel: str = "auto") -> None:
        super().__init__()
        self.num_experts = num_experts
        self.kernel = kernel
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    def put(self, expert: int, linear: nn.Module) -> None:
        """Take over the parameters that one expert's linear layer begins with; it is needed no more."""
        for name, value in linear.named_parameters(recurse=False):
            if expert == 0:
                self.register_parameter(name, self._stacked(value, self.num_experts))
            with torch.no_grad():
                getattr(self, name)[expert].copy_(value)

    @staticmethod
    def _stacked(value: nn.Parameter, num_experts: int) -> nn.Parameter:
        stacked = nn.Parameter(value.new_empty(num_experts, *value.shape), requires_grad=value.requires_grad)
        for name in _ATTRIBUTES:
            if hasattr(value, name):
                setattr(stacked, name, getattr(value, name))
        if hasattr(value, "partition_dim"):
            stacked.partition_dim = value.partition_dim + 1 if value.partition_dim >= 0 else -1
        return stacked

    def get_extra_state(self) -> None:
        """Nothing: it keeps a key in checkpoints, as Megatron's own linear layers do."""

    def set_extra_state(self, state: Any) -> None:
        """Of Transformer Engine's layers; not used."""

    def kernel_name(self) -> str:
        """Which kernel of ``grouped_linear`` computes with these weights."""
        return choose_kernel(self.weight, self.weight, self.kernel)

    def weight_gradients(self) -> str:
        """How they come to where they are summed up."""
        if self.kernel_name() == "loop":
            return "those of grouped experts added to the buffer one by one"
        return "torch grouped_mm, added to the buffer afterwards"

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are after the last step."""
        return self.weight, self.bias


def sharded_experts(
    parameter: nn.Parameter,
    key: str,
    offsets: Sequence[tuple[int, int, int]],
    expert_rank: tuple[int, int],
    shard_axis: int | None,
    shard: tuple[int, int],
    replica_id: ReplicaId,
    is_gated: bool,
) -> ShardedTensorFactory:
    """How a stacked parameter is saved: where ``SequentialMLP``'s lie, and all of a rank in one piece.

    Megatron plans for every piece of every rank, so that a piece for each expert takes long.

    Args:
        parameter: ``[E, ...]``.
        key: Of the checkpoint, the same for all experts.
        offsets: Where the layer lies among the axes before that of experts.
        expert_rank: This rank's number and the number of ranks that experts are shared out over.
        shard_axis: The axis of one expert's parameter that expert-tensor parallelism cuts; None if none.
        shard: This rank's number and the number of ranks that it is cut over.
        replica_id: Of this rank's copy.
        is_gated: Whether the first axis of one expert's holds gate and up, which are cut each for itself.
    """
    axis = len(offsets)
    rank, size = shard
    # Where an expert is whole its gate and up lie one after the other, as they do in the checkpoint.
    is_halved = is_gated and size > 1

    def part(data: Tensor, cut: list[tuple[int, int, int]], name: str, replica: ReplicaId) -> ShardedTensor:
        places = (*offsets, (axis, *expert_rank), *cut)
        return ShardedTensor.from_rank_offsets(name, data, *places, replica_id=replica, prepend_axis_num=axis)

    @torch.no_grad()
    def build(name: str, data: Tensor, replica: ReplicaId, flattened_range: slice | None) -> ShardedStateDict:
        if flattened_range is not None:
            raise ValueError(f"{name}: a flattened part of stacked experts has no entries of its own")
        if not is_halved:
            cut = [] if shard_axis is None else [(axis + 1 + shard_axis, rank, size)]
            return [part(data, cut, name, replica)]
        return [
            part(half, [(axis + 1, rank + number * size, 2 * size)], name, replica)
            for number, half in enumerate(data.chunk(2, 1))
        ]

    @torch.no_grad()
    def merge(loaded: list[Tensor]) -> Tensor:
        return torch.cat(loaded, 1) if is_halved else loaded[0]

    return ShardedTensorFactory(key, parameter, build, merge, replica_id)
