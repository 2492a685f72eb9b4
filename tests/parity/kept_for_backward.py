"""Put into a running rank: what autograd keeps of a forward pass."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch


def record_what_is_kept(file: Path) -> None:
    """Put into a rank: the bytes that autograd holds at the end of the first forward pass."""
    from megaplug.runtime import batch

    real = batch.forward_step

    @functools.wraps(real)
    def forward_step(data_iterator: Any, model: torch.nn.Module, **more: Any) -> Any:
        kept: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            answer = real(data_iterator, model, **more)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
        size = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
        if not file.exists():
            file.write_text(json.dumps(size))
        return answer

    batch.forward_step = forward_step
