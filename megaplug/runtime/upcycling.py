"""A dense model's checkpoint becomes experts: Megatron's ``upcycling_utils``, layer by layer, where it loads.

Megatron's own way, ``--moe-use-upcycling``, saves a checkpoint without optimizer at step 1, which a run that
is started again cannot go on from. It knows neither models with layers of both kinds, nor experts that are
cut otherwise than the dense MLP, nor a width of their own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe import upcycling_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megaplug.layers.experts.grouped import GroupedExperts

# What of a dense MLP tensor parallelism cuts, and along which axis.
_CUT = {"linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_fc2.weight": 1}


def watch(training: Any, args: Any, layer_spec: Any) -> None:
    """Make ``megatron.training.training`` load a dense model's checkpoint into this model.

    Args:
        training: That module.
        args: Megatron's arguments; ``moe_use_upcycling`` is taken out of them.
        layer_spec: As the model's config has it: layers that are dense where there are no experts.
    """
    args.moe_use_upcycling = False
    real_load = training.load_checkpoint

    @functools.wraps(real_load)
    def load_checkpoint(model: Any, optimizer: Any, *rest: Any, **kwargs: Any) -> Any:
        chunks = unwrap_model(model)
        dense = _dense_model(args, layer_spec, chunks[0].pg_collection)
        answer = real_load(dense, None, *rest, **kwargs)
        for chunk, source in zip(chunks, unwrap_model(dense), strict=True):
            upcycle(chunk, source)
        if (args.fp16 or args.bf16) and optimizer is not None:
            optimizer.reload_model_params()
        return answer

    training.load_checkpoint = load_checkpoint


def _dense_model(args: Any, layer_spec: Any, pg_collection: Any) -> list[nn.Module]:
    """The chunks of this rank, with an MLP wherever the model has experts."""
    from megatron.training import argument_utils

    dense_args = copy.copy(args)
    dense_args.num_experts, dense_args.moe_ffn_hidden_size = None, None
    # With a list of layers Megatron would give each one keys of its own.
    dense_args.moe_layer_freq, dense_args.expert_model_parallel_size = 1, 1
    config = argument_utils.gpt_config_from_args(dense_args)
    config.transformer_layer_spec = layer_spec
    builder = config.get_builder_cls()(config)
    return builder.build_distributed_models(pg_collection=pg_collection, wrap_with_ddp=False)


def upcycle(model: nn.Module, dense: nn.Module) -> None:
    """Give a model the weights of a dense one, and each of its experts those of the MLP in its place.

    Args:
        model: A ``GPTModel`` without wrappers; its routers keep what they have.
        dense: The same one with an MLP in every layer; it is changed.

    Raises:
        RuntimeError: The two differ in more than experts.
    """
    for layer, source in zip(model.decoder.layers, dense.decoder.layers, strict=True):
        if not isinstance(layer.mlp, MoELayer):
            layer.load_state_dict(source.state_dict())
            continue
        _cut_as_experts_are(source.mlp, layer.mlp)
        with _grouped_experts_are_known():
            state = upcycling_utils.upcycle_state_dict([layer], [source])["model"]
        layer.load_state_dict(state)
    _load_but_layers(model, dense)


def _load_but_layers(model: nn.Module, dense: nn.Module) -> None:
    state = {name: value for name, value in dense.state_dict().items() if not _is_of_layer(name)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if lacking := [name for name in missing if not _is_of_layer(name)]:
        raise RuntimeError(f"the dense model has no {', '.join(lacking)}")
    if unexpected:
        raise RuntimeError(f"the dense model has {', '.join(unexpected)} besides")


def _is_of_layer(name: str) -> bool:
    return name.startswith("decoder.layers.")


@contextlib.contextmanager
def _grouped_experts_are_known() -> Iterator[None]:
    """Megatron's function asks whether experts are its own; ours load what it makes for ``SequentialMLP``."""
    known: Any = upcycling_utils.SequentialMLP
    upcycling_utils.SequentialMLP = (SequentialMLP, GroupedExperts)
    try:
        yield
    finally:
        upcycling_utils.SequentialMLP = known


def _cut_as_experts_are(mlp: Any, moe: MoELayer) -> None:
    """Cut a dense MLP over the ranks of expert-tensor parallelism, where these are not those of TP."""
    here, there = mlp.tp_group, moe.experts.tp_group
    if here.size() == there.size():
        return
    for name, axis in _CUT.items():
        layer_name, _, kind = name.partition(".")
        linear = getattr(mlp, layer_name)
        if (parameter := getattr(linear, kind)) is None:
            continue
        num_parts = 2 if mlp.config.gated_linear_unit and layer_name == "linear_fc1" else 1
        value = _recut(parameter.data, axis, num_parts, here, there)
        setattr(linear, kind, nn.Parameter(value, requires_grad=False))


def _recut(value: Tensor, axis: int, num_parts: int, here: Any, there: Any) -> Tensor:
    """Of a tensor that is cut over one group this rank's share in another.

    Args:
        value: This rank's share.
        axis: Along which it is cut.
        num_parts: That it is made of along this axis, each cut for itself.
        here: The group that it is cut over.
        there: The other one.
    """
    shares = [torch.empty_like(value) for _ in range(here.size())]
    torch.distributed.all_gather(shares, value.contiguous(), group=here)
    by_rank = (share.chunk(num_parts, axis) for share in shares)
    parts = (torch.cat(of_ranks, axis) for of_ranks in zip(*by_rank, strict=True))
    return torch.cat([part.chunk(there.size(), axis)[there.rank()] for part in parts], axis)
