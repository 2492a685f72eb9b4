"""Torch's Adam in one kernel: without Apex and Transformer Engine, Megatron's takes a dozen of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


def install() -> RemovableHandle:
    """Have every torch Adam and AdamW of this process step in torch's fused kernel from now on.

    Megatron passes no ``fused`` on, and a checkpoint brings along the choice of the run that wrote it. So the
    choice is made before each step, with torch's own hook. The state is the same with both kernels.

    Returns:
        What takes the hook away again.
    """
    return register_optimizer_step_pre_hook(_choose_fused)


def is_chosen_for(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this optimizer's next step will be in the fused kernel by our choice."""
    return _choose_fused in _global_optimizer_pre_hooks.values() and _is_adam(optimizer)


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def _choose_fused(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _is_adam(optimizer):
        return
    for group in optimizer.param_groups:
        if group["differentiable"]:
            continue
        if not group["fused"]:
            group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if step is not None and step.device != parameter.device:
                # The fused kernel counts where it computes; the others, and some checkpoints, on the CPU.
                optimizer.state[parameter]["step"] = step.to(parameter.device)
