"""Faults that a parallel layout can have, put into the running ranks to see that the parity tests notice."""

from __future__ import annotations

from typing import Any

import torch


def row_parallel_does_not_reduce() -> None:
    """Each tensor-parallel rank keeps its own partial sum."""
    from megatron.core.tensor_parallel import layers

    layers.reduce_from_tensor_model_parallel_region = lambda tensor, group=None: tensor


def norms_are_not_marked() -> None:
    """The gradients of the norms are not summed over the ranks that hold other tokens."""
    from megaplug.layers import norm

    norm._mark = lambda module, config: None


def activations_arrive_changed() -> None:
    """What a pipeline stage computes on is not what the one before it has sent."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    real = TransformerBlock.set_input_tensor

    def set_input_tensor(self: Any, tensor: torch.Tensor | None) -> None:
        real(self, None if tensor is None else tensor.roll(1, dims=-1))

    TransformerBlock.set_input_tensor = set_input_tensor


def ranks_read_the_same_data() -> None:
    """Both data-parallel ranks train on the first one's half of the batch."""
    from megatron.training.datasets import data_samplers

    sampler: Any = data_samplers.MegatronPretrainingSampler
    sampler.get_start_end_idx = lambda self: (0, self.micro_batch_size)


def recomputation_differs() -> None:
    """What is computed again is not what was computed before."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    real = random.checkpoint

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        def noisy(*inner: Any) -> Any:
            out = function(*inner)
            scale = 1.01 if torch.is_grad_enabled() else 1.0
            return (out[0] * scale, *out[1:]) if isinstance(out, tuple) else out * scale

        return real(noisy, *args, **kwargs)

    random.checkpoint = checkpoint
    tensor_parallel.checkpoint = checkpoint


def rotated_keys_are_not_summed() -> None:
    """As in Megatron: the gradient of the keys' rotated part is that of a rank's own heads only."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from megaplug.layers.attention.latent import LatentSelfAttention

    LatentSelfAttention._qkv_down_projection = MLASelfAttention._qkv_down_projection


def parameters_are_not_waited_for() -> None:
    """The forward pass begins while parameters still come from the ranks that have updated them."""
    from megatron.core.distributed import DistributedDataParallel

    DistributedDataParallel._make_forward_pre_hook = lambda self: lambda module, *inputs: None


def experts_of_other_ranks_are_summed() -> None:
    """The ranks of tensor parallelism add up the gradients of biases, as of layers that they share."""
    from megaplug.layers.experts import stacked

    stacked._ATTRIBUTES = (*stacked._ATTRIBUTES, "sequence_parallel")


def experts_are_swapped() -> None:
    """Each expert-parallel rank computes its experts in the wrong order."""
    from megaplug.layers.experts import grouped

    real = grouped.swiglu_experts

    def swapped(x: Any, probs: Any, fc1: torch.Tensor, fc2: torch.Tensor, counts: Any) -> torch.Tensor:
        return real(x, probs, fc1.flip(0), fc2.flip(0), counts)

    grouped.swiglu_experts = swapped


def sequential_experts_are_swapped() -> None:
    """As ``experts_are_swapped``, of Megatron's experts."""
    from megatron.core.transformer.moe import experts

    real = experts.SequentialMLP.__init__

    def swapped(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.register_forward_pre_hook(lambda module, inner: _reverse(module))
        self.register_forward_hook(lambda module, inner, output: _reverse(module))

    experts.SequentialMLP.__init__ = swapped


def _reverse(module: Any) -> None:
    # In the same list, which Megatron knows modules by.
    children = module.local_experts._modules
    for name, expert in zip(list(children), list(reversed(children.values())), strict=True):
        children[name] = expert
