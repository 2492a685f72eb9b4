"""Mixtures of experts without numbers: every expert gets an even share of each rank's tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megaplug.runtime.rehearsal.meter import Meter


def shares(copies: int, num_experts: int) -> torch.Tensor:
    """Copies of tokens that each of the experts gets from one rank; the first ones take what is left over."""
    each, left = divmod(copies, num_experts)
    return torch.tensor([each + (expert < left) for expert in range(num_experts)])


def install(meter: Meter) -> None:
    """Answer what Megatron's token dispatchers read from a routing map."""
    from megatron.core.transformer.moe import token_dispatcher

    _install_alltoall(token_dispatcher.MoEAlltoAllTokenDispatcher)
    _install_allgather(token_dispatcher.MoEAllGatherTokenDispatcher, meter)


def _install_alltoall(dispatcher: Any) -> None:
    real = dispatcher.preprocess

    @functools.wraps(real)
    def preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        answer = real(self, routing_map)
        if self.drop_and_pad:
            return answer
        copies = routing_map.size(0) * self.config.moe_router_topk
        share = shares(copies, self.num_experts)
        local = share[self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        self.num_out_tokens = copies
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = share.view(self.ep_size, -1).sum(1)
            self.output_splits = local.sum().repeat(self.ep_size)
            self.output_splits_tp = self.output_splits.sum().repeat(self.tp_size)
        ranks = self.tp_size * self.ep_size
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = local.repeat(ranks, 1)
        return local * ranks

    dispatcher.preprocess = preprocess


def _install_allgather(dispatcher: Any, meter: Meter) -> None:
    real = dispatcher.dispatch_postprocess

    @functools.wraps(real)
    def dispatch_postprocess(self: Any, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        share = shares(hidden_states.size(0) * self.config.moe_router_topk, self.config.num_moe_experts)
        local = share[self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        meter.copies.append(local)
        meter.selected = int(local.sum())
        try:
            return real(self, hidden_states, probs)
        finally:
            meter.selected = None

    dispatcher.dispatch_postprocess = dispatch_postprocess
