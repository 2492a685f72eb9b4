"""One rank of a frozen job without numbers: Megatron's own model, schedule and optimizer, on ``meta``."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from megaplug.job.attention import attention_layers
from megaplug.job.experts import experts_choice
from megaplug.job.freeze import FrozenJob
from megaplug.runtime import cpu, fused_adam, packages, repairs
from megaplug.runtime.rehearsal import balanced, world
from megaplug.runtime.rehearsal.book import GRADIENTS, OPTIMIZER, OTHER, WEIGHTS
from megaplug.runtime.rehearsal.meter import Meter, watching_resizes
from megaplug.runtime.rehearsal.origins import OriginBook
from megaplug.runtime.rehearsal.traffic import sent_bytes


def prepare() -> None:
    """Put the stand-in and the repairs in place and import Megatron, once for all ranks of the process."""
    # Megatron asks for the compiler when it is first imported, and our layers import it.
    assert "megatron.core" not in sys.modules, "Megatron is here already, with its compiled functions"
    # Whoever imports it makes a folder for its pictures, which a process that is killed leaves behind.
    sys.modules["wandb"] = None  # type: ignore[assignment]
    _compile_nothing()
    from megaplug.runtime.rehearsal import kernels

    cpu.install_without_numbers()
    for package in ("te", "apex"):
        packages.keep_out(package)
    repairs.apply()
    fused_adam.install()
    kernels.install()
    from megatron.training import training  # noqa: F401


_meters: list[Meter] = []


def _compile_nothing() -> None:
    """Functions that Megatron has compiled for a GPU run as they are, and count as one kernel each way."""

    def as_one_kernel(function: Any = None, **options: Any) -> Any:
        if function is None:
            return as_one_kernel

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten(args)
            has_gradient = any(isinstance(item, torch.Tensor) and item.requires_grad for item in leaves)
            if torch.is_grad_enabled() and has_gradient and not kwargs:
                return _OneKernel.apply(function, form, *leaves)
            with _meters[-1].one_kernel():
                return function(*args, **kwargs)

        return run

    namespace: Any = torch
    namespace.compile = as_one_kernel


class _OneKernel(torch.autograd.Function):
    """A compiled function of one tensor, with its derivative: what does not outlive them takes no memory."""

    @staticmethod
    def forward(ctx: Any, function: Any, form: Any, *leaves: Any) -> Any:
        anchor = torch.zeros((), device="cpu", requires_grad=True)
        entered = []
        with torch.enable_grad(), _meters[-1].one_kernel():
            for item in leaves:
                wanted = isinstance(item, torch.Tensor) and item.requires_grad
                entered.append(_Entered.apply(anchor, item) if wanted else item)
            out = function(*tree_unflatten(entered, form))
        # Edges of the graph, which unlike tensors keep nothing.
        ctx.wanted = [
            torch.autograd.graph.get_gradient_edge(own)
            if isinstance(own, torch.Tensor) and own.requires_grad
            else None
            for own in entered
        ]
        ctx.out = torch.autograd.graph.get_gradient_edge(out)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        wanted = [edge for edge in ctx.wanted if edge is not None]
        with _meters[-1].one_kernel():
            found = iter(torch.autograd.grad([ctx.out], wanted, list(grads)))
        ctx.out = None
        return (None, None, *(None if edge is None else next(found) for edge in ctx.wanted))


class _Entered(torch.autograd.Function):
    """Where a tensor comes into the graph of a compiled function."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, tensor: Any) -> Any:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        raise AssertionError("the gradient is taken from the edge")


def rehearse(frozen: FrozenJob, rank: int, *, with_origins: bool = False) -> dict[str, Any]:
    """Build the rank and take one step of it.

    Args:
        frozen: The job; nothing of its folder is read or written.
        rank: Which of its ranks.
        with_origins: Whether who made what was there at the peak is found out, too.

    Returns:
        What was counted, as plain values.
    """
    started = time.perf_counter()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(frozen.topology.world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"
    )
    meter = Meter(book=OriginBook() if with_origins else None)
    _meters.append(meter)
    balanced.install(meter)
    args, model_config = _initialize(frozen, rank)
    meter.part_selected = (args.moe_router_topk or 1) / (args.num_experts or 1)
    with meter, watching_resizes(meter.book):
        model, optimizer, scheduler = _build(args, model_config)
        book = meter.book
        book.belongs(_weights(model), WEIGHTS)
        book.belongs(_gradients(model), GRADIENTS)
        # Adam's state comes with the first step; a run's peak is that of any later one.
        _step_optimizer(optimizer, meter)
        weights = {item.untyped_storage()._cdata for item in _weights(model)}
        book.belongs(_states(optimizer, weights), OPTIMIZER)
        book.rest_is(OTHER, (WEIGHTS, GRADIENTS, OPTIMIZER))
        meter.start()
        at_rest = dict(book.live)
        _train_step(args, frozen, model, optimizer, scheduler, meter)
    return _figures(rank, model, meter, at_rest, time.perf_counter() - started)


def _initialize(frozen: FrozenJob, rank: int) -> tuple[Any, Any]:
    from megatron.training import argument_utils, training
    from megatron.training.arguments import parse_and_validate_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megaplug.layers.attention.megatron_tokens import spread_as
    from megaplug.layers.spec import transformer_layer_spec

    sys.argv = ["megaplug", *frozen.megatron_args]
    args = parse_and_validate_args()
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=frozen.topology.world_size
    )
    world.install(rank)
    training.initialize_megatron()
    # Megatron's handler waits for the end of a step; nothing here is worth saving.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    job = frozen.job
    model_config = argument_utils.gpt_config_from_args(args)
    attention = attention_layers(job.attention)
    spread_as(attention.token_layout())
    backend = frozen.derived.backend
    experts = experts_choice(job, backend)
    model_config.transformer_layer_spec = transformer_layer_spec(attention, backend, experts)
    return args, model_config


def _build(args: Any, model_config: Any) -> tuple[Any, Any, Any]:
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import argument_utils, training

    container = argument_utils.pretrain_cfg_container_from_args(args, model_config)
    return training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _step_optimizer(optimizer: Any, meter: Meter) -> None:
    with _marked(meter):
        optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def _marked(meter: Meter) -> Iterator[None]:
    meter.in_optimizer = True
    try:
        yield
    finally:
        meter.in_optimizer = False


def _train_step(
    args: Any, frozen: FrozenJob, model: Any, optimizer: Any, scheduler: Any, meter: Meter
) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config
    from megatron.training import training

    from megaplug.runtime.batch import forward_step
    from megaplug.runtime.source_losses import SourceLosses

    real = optimizer.step

    @functools.wraps(real)
    def step(*args: Any, **kwargs: Any) -> Any:
        with _marked(meter):
            return real(*args, **kwargs)

    optimizer.step = step
    config = get_model_config(model[0])
    _set_up_hooks(args, model, optimizer, config)
    batches = itertools.repeat(_batch(args))
    iterators = [batches] * len(model) if len(model) > 1 else batches
    training.train_step(
        partial(
            forward_step,
            sources=SourceLosses(frozen.facts),
            loss_chunk_tokens=frozen.job.train.loss_chunk_tokens,
        ),
        iterators,
        model,
        optimizer,
        scheduler,
        config,
        get_forward_backward_func(),
        iteration=0,
    )


def _set_up_hooks(args: Any, model: Any, optimizer: Any, config: Any) -> None:
    """What Megatron's ``train()`` sets in the config before its first step."""
    from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

    for chunk in model:
        chunk.train()
    config.grad_scale_func = optimizer.scale_loss
    is_ddp = isinstance(model[0], DistributedDataParallel)
    if is_ddp and args.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in model])
        if args.align_grad_reduce:
            config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in model])
    if args.overlap_param_gather and args.align_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in model])
    config.finalize_model_grads_func = finalize_model_grads


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def _batch(args: Any) -> dict[str, torch.Tensor]:
    """A microbatch as a data loader gives it, on the CPU."""
    shape = (args.micro_batch_size, args.seq_length)
    words = torch.zeros(shape, dtype=torch.int64)
    return {"tokens": words, "labels": words, "loss_mask": torch.ones(shape), "position_ids": words}


def _weights(model: Any) -> list[torch.Tensor]:
    kept = [item for chunk in model for item in chunk.parameters()]
    return kept + [buffer.param_data for buffer in _buffers(model) if buffer.param_data is not None]


def _gradients(model: Any) -> list[torch.Tensor]:
    return [buffer.grad_data for buffer in _buffers(model)]


def _buffers(model: Any) -> list[Any]:
    return [
        buffer
        for chunk in model
        for name in ("buffers", "expert_parallel_buffers")
        for buffer in (getattr(chunk, name, None) if not callable(getattr(chunk, name, None)) else None) or ()
    ]


def _states(optimizer: Any, weights: set[int]) -> list[torch.Tensor]:
    """What the optimizer keeps; in fp32 it steps the weights themselves, which are left out."""
    found: list[Any] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:
            continue
        found += [item for group in inner.param_groups for item in group["params"]]
        found += [item for state in inner.state.values() for item in state.values()]
    return [item for item in found if torch.is_tensor(item) and item.untyped_storage()._cdata not in weights]


def _figures(rank: int, model: Any, meter: Meter, at_rest: dict[str, int], seconds: float) -> dict[str, Any]:
    from megatron.core import mpu

    dense = expert = 0
    for chunk in model:
        for parameter in chunk.parameters():
            if getattr(parameter, "allreduce", True):
                dense += parameter.numel()
            else:
                expert += parameter.numel()
    book, traffic = meter.book, meter.traffic
    return {
        "rank": rank,
        "stage": mpu.get_pipeline_model_parallel_rank(),
        "dense_parameters": dense,
        "expert_parameters": expert,
        "peak_bytes": book.exact_peak,
        "peak_bytes_in_blocks": book.peak,
        "at_peak": book.at_peak,
        "origins": book.origins(),
        "at_rest": at_rest,
        "flops": dict(meter.flops),
        "traffic": [
            {
                "group": group,
                "size": traffic.sizes[group],
                "collective": collective,
                "calls": traffic.calls[group, collective],
                "bytes": nbytes,
                "sent_bytes": round(sent_bytes(collective, nbytes, traffic.sizes[group])),
            }
            for (group, collective), nbytes in sorted(traffic.bytes.items())
        ],
        "seconds": round(seconds, 2),
    }
