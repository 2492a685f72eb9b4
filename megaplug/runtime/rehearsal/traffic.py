"""Communication that is counted and not done: the collectives of torch by process group, with their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# Megatron's descriptions of its groups, in the words of the plan.
_NAMES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp_ep",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "MODEL_PARALLEL_GROUP": "tp_pp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "EMBEDDING_GROUP": "embedding",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "etp_ep_pp",
    # All ranks, unless there are several copies of the distributed optimizer.
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "world",
    "default_pg": "world",
}
# By operator of torch: the name shown, the places of the tensors that bound what travels, and of the group.
_COLLECTIVES: dict[str, tuple[str, tuple[int, ...], int]] = {
    "allreduce_": ("all_reduce", (0,), 1),
    "allreduce_coalesced_": ("all_reduce", (0,), 1),
    "broadcast_": ("broadcast", (0,), 1),
    "reduce_": ("reduce", (0,), 1),
    "send": ("send", (0,), 1),
    "recv_": ("recv", (0,), 1),
    "_allgather_base_": ("all_gather", (0,), 2),
    "allgather_": ("all_gather", (0,), 2),
    "allgather_into_tensor_coalesced_": ("all_gather", (0,), 2),
    "_reduce_scatter_base_": ("reduce_scatter", (1,), 2),
    "reduce_scatter_": ("reduce_scatter", (1,), 2),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", (1,), 2),
    "alltoall_base_": ("all_to_all", (1,), 2),
    "alltoall_": ("all_to_all", (1,), 2),
    "barrier": ("barrier", (), 1),
}


class Traffic:
    """Bytes and calls by group and collective.

    Bytes are those of the whole buffer: what an all-reduce reduces, an all-gather ends with, a reduce-scatter
    starts from, an all-to-all or a send sends, a recv receives. A group of one rank has no traffic.

    Attributes:
        bytes: By ``(group, collective)``.
        calls: Likewise.
        sizes: Ranks of each group.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.sizes: dict[str, int] = {}

    def count(self, name: str, args: Sequence[Any]) -> None:
        """Enter one call of ``torch.ops.c10d.<name>``, which must be one whose bytes can be counted."""
        from torch.distributed import ProcessGroup

        # Counted as nothing, a new operator of Megatron's would go unseen.
        assert name in _COLLECTIVES, f"the rehearsal knows no collective c10d.{name}"
        shown, places, where = _COLLECTIVES[name]
        group = ProcessGroup.unbox(args[where])
        if group.size() == 1 or not places:
            return
        name = group_name(group)
        if shown in ("send", "recv") and name != "cp":
            # Of two stages Megatron sends to one side in the pipeline's group, to the other in the world's.
            name = "pp"
        key = name, shown
        self.sizes[key[0]] = group.size()
        self.bytes[key] += sum(_nbytes(args[place]) for place in places)
        self.calls[key] += 1


def group_name(group: Any) -> str:
    """The short name of one of Megatron's groups; torch's description of another."""
    description = group.group_desc
    return _NAMES.get(description, description.lower())


def sent_bytes(collective: str, nbytes: int, size: int) -> float:
    """What one rank sends in the usual ring algorithm for that buffer."""
    share = (size - 1) / size
    factors = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share}
    return nbytes * (0 if collective == "recv" else factors.get(collective, 1.0))


def _nbytes(found: Any) -> int:
    if isinstance(found, list | tuple):
        return sum(_nbytes(item) for item in found)
    return int(found.numel() * found.element_size())


def answer(name: str, args: Sequence[Any]) -> Any:
    """What the operator returns: its outputs as they are, and a work that is done."""
    from torch._C._distributed_c10d import FakeWork

    work = FakeWork().boxed()
    if name in ("allreduce_", "broadcast_"):
        return args[0], work
    if name in ("_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_", "alltoall_"):
        return args[0], work
    return work
