"""What Megatron itself says of a job, from its argument parser to the first microbatch of its schedule.

Every step is Megatron's own function under torch's fake process group: parser and ``validate_args``, the
configuration, ``initialize_model_parallel``, the dealing out of layers, one layer of each kind, the embedding
and the output layer, the projection of queries, keys and values, the cut of the sequence, the router, the
number of microbatches and the way into the interleaved schedule. The first that raises has refused the job.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from megaplug.job.megatron_table import load_table
from megaplug.job.schema import Job
from megaplug.topology import Topology

# A run without a GPU or compiled kernels; nothing here depends on the job.
FIXED: dict[str, Any] = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "use_distributed_optimizer": True,
    "train_iters": 10,
    "lr": 1e-3,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
MODEL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "seq_length",
    "make_vocab_size_divisible_by", "normalization", "qk_layernorm", "swiglu", "squared_relu",
    "add_bias_linear", "add_qkv_bias", "position_embedding_type", "untie_embeddings_and_output_weights",
)  # fmt: skip
LATENT = (
    "multi_latent_attention", "rope_type", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim",
)  # fmt: skip
MOE = (
    "num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_load_balancing_type", "moe_shared_expert_intermediate_size",
    "moe_layer_freq", "moe_aux_loss_coeff", "moe_router_num_groups", "moe_router_group_topk",
    "moe_expert_capacity_factor", "moe_router_enable_expert_bias", "moe_token_dispatcher_type",
)  # fmt: skip
STAGES = (
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


class Reached(Exception):
    """Raised from inside Megatron's function once its checks are behind."""


def words_of(job: Job, topology: Topology, padded_vocab_size: int) -> list[str]:
    """The command line that this job is for Megatron's parser."""
    values: dict[str, Any] = {
        **FIXED,
        **{key: getattr(job.model, key) for key in MODEL},
        "num_query_groups": job.model.num_query_groups,
        "group_query_attention": not job.model.multi_latent_attention,
        "max_position_embeddings": job.model.seq_length,
        "padded_vocab_size": padded_vocab_size,
        "vocab_size": job.model.vocab_size,
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "num_virtual_stages_per_pipeline_rank": topology.vpp,
        "context_parallel_size": topology.cp,
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": topology.etp,
        "sequence_parallel": topology.sequence_parallel,
        **{key: getattr(topology, key) for key in STAGES},
        "micro_batch_size": job.train.micro_batch_size,
        "global_batch_size": job.train.global_batch_size,
        "overlap_p2p_comm": job.overlap.overlap_p2p_comm is not False,
    }
    if job.model.multi_latent_attention:
        values |= {key: getattr(job.model, key) for key in LATENT}
    if job.moe.num_experts:
        values |= {key: getattr(job.moe, key) for key in MOE}
    table = load_table()
    return [word for dest, value in values.items() for word in table[dest].render(value)]


def refusal(job: Job, topology: Topology, padded_vocab_size: int) -> tuple[str, str] | None:
    """Which step of Megatron's refuses a job, and with which words; None if it lets the job through."""
    step = "arguments"
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            args = _arguments(words_of(job, topology, padded_vocab_size), topology.world_size)
            for step, function in _steps(job, topology, args, padded_vocab_size):  # noqa: B007  told below
                function()
        except (
            AssertionError,
            ValueError,
            RuntimeError,
            ZeroDivisionError,
            IndexError,
            TypeError,
            SystemExit,
        ) as error:
            if isinstance(error, RecursionError):
                raise
            return step, f"{type(error).__name__}: {error}"[:300]
        finally:
            _end_world()
    return None


def _steps(
    job: Job, topology: Topology, args: Any, padded_vocab_size: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The steps after the arguments, by name; each finds what the earlier ones made."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training.argument_utils import core_transformer_config_from_args

    made: dict[str, Any] = {}
    kind = MLATransformerConfig if job.model.multi_latent_attention else None
    # The arguments turn sequence parallelism off where tp is 1; the configuration refuses it.
    yield (
        "configuration",
        lambda: ModelParallelConfig(
            tensor_model_parallel_size=topology.tp, sequence_parallel=topology.sequence_parallel
        ),
    )
    yield "configuration", lambda: made.update(config=core_transformer_config_from_args(args, kind))
    yield "process groups", lambda: _begin_world(topology)
    yield "layers", lambda: _deal_out(made["config"])
    yield "model", lambda: made.update(layers=_build(made["config"], args, padded_vocab_size))
    yield "forward", lambda: _forward(made["layers"], made["config"], job, topology)
    yield "microbatches", lambda: _microbatches(args)
    yield "schedule", lambda: _schedule(made["config"], job, topology)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _arguments(words: list[str], world_size: int) -> Any:
    """Megatron's own ``parse_args`` and ``validate_args``; only the parser is not built anew for each job."""
    from megatron.training import arguments

    os.environ.update(WORLD_SIZE=str(world_size), RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    sys.argv = ["megatron", *words]
    built = _parser()
    real = arguments.add_megatron_arguments, arguments._print_args
    arguments.add_megatron_arguments = lambda parser: built
    arguments._print_args = lambda title, args: None
    try:
        return arguments.validate_args(arguments.parse_args())
    finally:
        arguments.add_megatron_arguments, arguments._print_args = real


def _begin_world(topology: Topology) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=topology.world_size)
    parallel_state.initialize_model_parallel(
        topology.tp,
        topology.pp,
        topology.vpp,
        context_parallel_size=topology.cp,
        expert_model_parallel_size=topology.ep,
        expert_tensor_parallel_size=topology.etp,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)


def _end_world() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    unset_num_microbatches_calculator()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _deal_out(config: Any) -> None:
    """Megatron's counts and offsets of every stage; it does not see itself that a layer is left out."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    built: list[int] = []
    for stage in range(config.pipeline_model_parallel_size):
        for chunk in range(config.virtual_pipeline_model_parallel_size or 1):
            vp_stage = chunk if config.virtual_pipeline_model_parallel_size else None
            start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
            count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
            if count < 0:
                raise ValueError(f"stage {stage} would have {count} layers")
            built += range(start, start + count)
    if sorted(built) != list(range(config.num_layers)):
        raise ValueError(f"layers built: {sorted(built)}")


def _build(config: Any, args: Any, padded_vocab_size: int) -> list[Any]:
    """One layer of each kind that the model has, its embedding and its output layer.

    The layers are those of the native backend: Megatron's own without Transformer Engine have no norm for
    sequence parallelism and no latent attention. Their core attention is left out: what a kernel cannot do is
    no question of the topology.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.spec_utils import build_module

    from megaplug.layers.registry import AttentionLayers
    from megaplug.layers.spec import _native_layer

    provider = _provider(config.normalization)
    is_moe = [False]
    if config.num_moe_experts:
        specs = get_gpt_decoder_layer_specs(config, False, config.normalization)
        is_moe = sorted({"MoELayer" in str(spec.submodules.mlp) for spec in specs})
    vp_stage = None if config.virtual_pipeline_model_parallel_size is None else 0
    attention = AttentionLayers.alike("flash", {})
    specs = [_native_layer(config, provider, kind, attention) for kind in is_moe]
    for spec in specs:
        spec.submodules.self_attention.submodules.core_attention = _no_core_attention()
    layers = [build_module(spec, config=config, layer_number=1, vp_stage=vp_stage) for spec in specs]
    LanguageModelEmbedding(config, padded_vocab_size, args.seq_length, args.position_embedding_type)
    ColumnParallelLinear(
        config.hidden_size,
        padded_vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    return layers


@functools.cache
def _no_core_attention() -> type:
    import torch

    class NoCoreAttention(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

    return NoCoreAttention


@functools.cache
def _provider(normalization: str) -> Any:
    from megaplug.layers.backend import native_provider

    return native_provider("flash", {}, normalization)


def _forward(layers: list[Any], config: Any, job: Job, topology: Topology) -> None:
    """The cut of the sequence, queries, keys and values of a layer, and a MoE layer up to its dispatcher."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    tokens = job.model.seq_length // topology.cp
    hidden = torch.zeros(tokens, 1, config.hidden_size)
    if config.sequence_parallel:
        hidden = scatter_to_sequence_parallel_region(
            hidden, group=parallel_state.get_tensor_model_parallel_group()
        )
    with torch.no_grad():
        if not config.multi_latent_attention:
            layers[0].self_attention.get_query_key_value_tensors(hidden)
        for layer in layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.train()
                layer.mlp.preprocess = _reached
                with contextlib.suppress(Reached):
                    layer.mlp(hidden)


def _microbatches(args: Any) -> None:
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    init_num_microbatches_calculator(
        0, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )


def _schedule(config: Any, job: Job, topology: Topology) -> None:
    """Into the schedule that Megatron chooses, up to the first forward pass of the first stage."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    chunks = [torch.nn.Linear(1, 1) for _ in range(topology.vpp or 1)]
    for chunk in chunks:
        chunk.config, chunk.model_type = config, ModelType.encoder_or_decoder
        chunk.set_input_tensor = lambda tensor: None
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    with contextlib.suppress(Reached):
        get_forward_backward_func()(
            forward_step_func=_reached,
            data_iterator=[None] * len(chunks) if interleaved else None,
            model=chunks if interleaved else chunks[0],
            num_microbatches=get_num_microbatches(),
            seq_length=job.model.seq_length,
            micro_batch_size=job.train.micro_batch_size,
        )
        raise AssertionError("the schedule ended without a forward pass")


def _reached(*args: Any, **kwargs: Any) -> Any:
    raise Reached


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
