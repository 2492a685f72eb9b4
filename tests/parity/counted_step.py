"""Put into a running rank: what its second step really computes and sends, counted apart from megaplug."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Operator: argument with the whole buffer, argument with the group.
BUFFERS = {
    "allreduce_": (0, 1),
    "allreduce_coalesced_": (0, 1),
    "send": (0, 1),
    "recv_": (0, 1),
    "_allgather_base_": (0, 2),
    "allgather_into_tensor_coalesced_": (0, 2),
    "_reduce_scatter_base_": (1, 2),
    "reduce_scatter_tensor_coalesced_": (1, 2),
    "alltoall_base_": (1, 2),
}


class Sent(TorchDispatchMode):
    """Bytes by the ranks that talk and the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func._overloadpacket.__name__ != "barrier":
            buffer, where = BUFFERS[func._overloadpacket.__name__]
            group = ProcessGroup.unbox(args[where])
            tensors = args[buffer] if isinstance(args[buffer], list) else [args[buffer]]
            nbytes = sum(tensor.nbytes for tensor in tensors)
            if group.size() > 1:
                self.bytes[func._overloadpacket.__name__.replace("_coalesced", "")] += nbytes
        return func(*args, **(kwargs or {}))


def count_second_step(folder: Path) -> None:
    """Put into a rank: parameters, FLOPs and bytes of its second step, written as JSON."""
    from megatron.training import training

    real = training.train_step
    calls = []

    @functools.wraps(real)
    def train_step(forward_step: Any, data: Any, model: Any, *more: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) != 2:
            return real(forward_step, data, model, *more, **named)
        sent = Sent()
        with FlopCounterMode(display=False) as flops, sent:
            answer = real(forward_step, data, model, *more, **named)
        found = {
            "parameters": sum(item.numel() for chunk in model for item in chunk.parameters()),
            "flops": flops.get_total_flops(),
            "bytes": dict(sent.bytes),
        }
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return answer

    training.train_step = train_step
