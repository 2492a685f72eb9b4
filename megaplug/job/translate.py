"""From a job to the words that Megatron's argument parser reads.

A key that bears the name of a Megatron argument needs no line here: the table knows it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megaplug.job.attention import attention_layers
from megaplug.job.experts import layer_freq
from megaplug.job.megatron_table import load_table
from megaplug.job.names import ALIASES, OURS, SECTIONS
from megaplug.job.overlap import ON
from megaplug.job.packages import why_no_fused_weight_gradients
from megaplug.job.plain_command import SPEC
from megaplug.job.recompute import granularity, method_and_layers
from megaplug.job.schema import Job
from megaplug.job.sharding import sharding_arguments
from megaplug.job.upcycling import UPCYCLE

if TYPE_CHECKING:
    from megaplug.job.derive import Derived
    from megaplug.job.facts import DataFacts
    from megaplug.job.load import Source
    from megaplug.runs.folder import RunFolder
    from megaplug.topology import Topology


def megatron_arguments(
    job: Job,
    topology: Topology,
    derived: Derived,
    facts: DataFacts,
    folder: RunFolder,
    *,
    source: Source | None = None,
    resuming: bool = False,
) -> list[str]:
    """The command line for Megatron's parser.

    Args:
        job: A job that passed its checks.
        topology: Its resolved rank grid.
        derived: What follows from job, topology and data; also the device.
        facts: Where the tokenized data lies, and Megatron's arguments for its tokenizer.
        folder: The run's folder; paths are written out in full.
        source: What the run starts from, if not from scratch.
        resuming: The run has a checkpoint of its own, which takes the place of ``source``.
    """
    values: dict[str, Any] = {
        **dict(_named(job, topology)),
        **_constants(job, derived),
        **{name: word == ON for name, word in derived.overlap.items()},
        **_layers(job, derived),
        **sharding_arguments(job),
        **_memory(job),
        **_lengths(job, derived),
        **_expert_layers(job),
        **_latent_attention(job),
        **_paths(job, facts, folder),
        **_watching(job),
        **_saving(derived),
        **_loading(folder, source, resuming, job.load_state == UPCYCLE),
        **job.megatron,
    }
    table = load_table()
    words = [word for dest, value in values.items() for word in table[dest].render(value)]
    return [*words, *facts.tokenizer_arguments]


def _named(job: Job, topology: Topology) -> Iterator[tuple[str, Any]]:
    """Every key of ours that has a Megatron argument, with its value."""
    for section in SECTIONS:
        config = getattr(job, section)
        if section == "moe" and not config.num_experts:
            continue
        for key in (item.name for item in dataclasses.fields(config)):
            dotted = f"{section}.{key}"
            if dotted in OURS:
                continue
            # A resolved topology knows what an open request left out.
            value = getattr(topology if section == "topology" else config, key)
            # Megatron takes no empty list.
            yield ALIASES.get(dotted, key), None if value == [] else value


def _constants(job: Job, derived: Derived) -> dict[str, Any]:
    """What megaplug always asks of Megatron, by device and backend."""
    native, on_cpu = derived.backend == "native", derived.device == "cpu"
    values: dict[str, Any] = {
        "transformer_impl": "local" if native else "transformer_engine",
        "group_query_attention": True,
        "exit_signal_handler": True,
        "dataloader_type": "single",
        # The core attentions are causal by themselves; a mask would be seq_length x seq_length per sequence.
        "create_attention_mask_in_dataloader": False,
        "log_throughput": True,
        "enable_one_logger": False,
        # Megatron's own output layer raises without the extension, with Transformer Engine too.
        "gradient_accumulation_fusion": not why_no_fused_weight_gradients(job.kernels.apex, derived.device),
    }
    if native:
        # Kernels of Apex and Transformer Engine.
        values |= {
            "no_persist_layer_norm": True,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
        }
    if native and "moe_act" in (job.train.recompute_modules or ()):
        # Megatron's own checks ask for it there.
        values["moe_grouped_gemm"] = True
    if job.cuda_graph.cuda_graph_impl == "full_iteration":
        # To look at a number is to wait for the GPU, which a captured step cannot.
        values["check_for_nan_in_loss_and_grad"] = False
    if on_cpu:
        values |= {
            "distributed_backend": "gloo",
            "use_cpu_initialization": True,
            # A loader's pin-memory thread needs a GPU.
            "num_workers": 0,
            # These are compiled for a GPU.
            "bias_swiglu_fusion": False,
            "bias_gelu_fusion": False,
            "bias_dropout_fusion": False,
        }
    elif not job.model.swiglu and (
        job.model.squared_relu or not job.model.add_bias_linear or job.moe.num_experts
    ):
        # Megatron refuses to fuse another activation than GELU, GELU with a bias that is not there, and that
        # of experts.
        values["bias_gelu_fusion"] = False
    elif job.model.swiglu and job.model.add_bias_linear and job.moe.num_experts:
        # The fused SwiGLU of experts has no bias (weighted_bias_swiglu_impl raises).
        values["bias_swiglu_fusion"] = False
    return values


def _layers(job: Job, derived: Derived) -> dict[str, Any]:
    """Where a layer is ours, what makes Megatron-LM's own ``pretrain_gpt.py`` build it."""
    ours = derived.backend == "native" or attention_layers(job.attention).names != ("te",)
    return {"spec": list(SPEC)} if ours else {}


def _expert_layers(job: Job) -> dict[str, Any]:
    """Layers that are named by their numbers."""
    if not job.moe.num_experts or job.moe.layers is None:
        return {}
    return {"moe_layer_freq": layer_freq(job.moe, job.model.num_layers)}


def _latent_attention(job: Job) -> dict[str, Any]:
    """Megatron takes no groups of heads beside it, and calls its fused RoPE experimental."""
    if not job.model.multi_latent_attention:
        return {}
    return {"group_query_attention": False, "apply_rope_fusion": False}


def _memory(job: Job) -> dict[str, Any]:
    """What the keys about recomputation and offload imply where they are left open."""
    method, layers = method_and_layers(job.train)
    values: dict[str, Any] = {
        "recompute_granularity": granularity(job.train),
        "recompute_method": method,
        "recompute_num_layers": layers,
    }
    if job.optimizer.optimizer_cpu_offload:
        # The offloading optimizer goes this one's way through the distributed optimizer.
        values["use_precision_aware_optimizer"] = True
    return values


def _lengths(job: Job, derived: Derived) -> dict[str, Any]:
    stop_at = job.train.stop_at
    return {
        "train_iters": derived.iters,
        "max_position_embeddings": job.model.seq_length,
        "padded_vocab_size": derived.padded_vocab_size,
        "save_interval": derived.save_interval,
        "eval_interval": derived.eval_interval,
        "eval_iters": derived.eval_iters,
        "exit_interval": stop_at if stop_at is not None and stop_at < derived.iters else None,
        "distributed_timeout_minutes": job.launch.distributed_timeout_minutes,
    }


def _paths(job: Job, facts: DataFacts, folder: RunFolder) -> dict[str, Any]:
    root = folder.path.resolve()
    values: dict[str, Any] = {
        f"{split}_data_path": facts.data_path(split)
        for split in ("train", "valid", "test")
        if facts.parts(split)
    }
    values["data_cache_path"] = str(root / folder.index_cache.name)
    values["save"] = str(root / folder.checkpoints.name)
    if job.logging.tensorboard:
        values["tensorboard_dir"] = str(root / folder.tensorboard.name)
    if job.logging.wandb_project is not None:
        values |= {"wandb_exp_name": folder.name, "wandb_save_dir": str(root / "wandb")}
    return values


def _saving(derived: Derived) -> dict[str, Any]:
    """NVRx's own way of saving; Megatron refuses that of forked processes here, a rank turns it on later."""
    if derived.async_strategy != "nvrx":
        return {}
    return {"async_save": True, "async_strategy": "nvrx", "use_persistent_ckpt_worker": True}


def _watching(job: Job) -> dict[str, Any]:
    """Log level and, with ``profile=nsys``, Megatron's ranges; the torch profiler is megaplug's own."""
    values: dict[str, Any] = {"logging_level": getattr(logging, job.logging.level.upper())}
    profile = job.profile
    if profile.kind == "nsys":
        start = profile.wait + profile.warmup
        values |= {
            "profile": True,
            "profile_ranks": profile.ranks,
            # Counted from the start of the command; a rank adds the step that it continues from.
            "profile_step_start": start,
            "profile_step_end": start + profile.active,
            "nvtx_ranges": True,
            "record_shapes": profile.record_shapes,
        }
    return values


def _loading(folder: RunFolder, source: Source | None, resuming: bool, upcycles: bool) -> dict[str, Any]:
    """Which checkpoint the run begins with: its own newest, another run's, or none."""
    if source is None or resuming:
        own = str(folder.checkpoints.resolve())
        # Megatron begins from scratch without a word where a checkpoint is missing.
        return {"load": own, "exit_on_missing_checkpoint": True} if resuming else {"load": own}
    values: dict[str, Any] = {"load": str(source.staging(folder)), "exit_on_missing_checkpoint": True}
    if source.weights_only:
        values |= {"finetune": True, "no_load_optim": True, "no_load_rng": True}
        return values | ({"moe_use_upcycling": True} if upcycles else {})
    # The schedule of this job holds, not the one that the other run was given.
    return values | {"override_opt_param_scheduler": True}
