"""From a job to the words that Megatron's argument parser reads.

A key that bears the name of a Megatron argument needs no line here: the table knows it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megaplug.errors import Problem
from megaplug.job.megatron_table import load_table
from megaplug.job.schema import Job
from megaplug.job.suggest import closest

if TYPE_CHECKING:
    from megaplug.job.derive import Derived
    from megaplug.job.facts import DataFacts
    from megaplug.job.load import Source
    from megaplug.runs.folder import RunFolder
    from megaplug.topology import Topology

# The few keys that are shorter than, or differ from, Megatron's name for the same value.
ALIASES = {
    "topology.tp": "tensor_model_parallel_size",
    "topology.pp": "pipeline_model_parallel_size",
    "topology.vpp": "num_virtual_stages_per_pipeline_rank",
    "topology.cp": "context_parallel_size",
    "topology.ep": "expert_model_parallel_size",
    "topology.etp": "expert_tensor_parallel_size",
    "model.norm_epsilon": "layernorm_epsilon",
    "train.iters": "train_iters",
}

# Keys that have no Megatron argument of their own: megaplug acts on them, or others follow from them.
OURS = frozenset(
    {
        "model.name", "model.vocab_size", "topology.dp", "topology.world_size", "train.tokens",
        "train.epochs", "train.stop_at", "checkpoint.keep", "logging.progress", "logging.tensorboard",
    }
)  # fmt: skip

_GENERIC = ("model", "topology", "moe", "train", "optimizer", "lr", "precision", "checkpoint", "logging")

# Arguments that megaplug gives itself, with what to use instead.
RESERVED = {
    "load": "load=<run or checkpoint>",
    "save": "runs_dir",
    "pretrained_checkpoint": "load=<run or checkpoint>",
    "finetune": "load_state=weights",
    "no_load_optim": "load_state",
    "no_load_rng": "load_state",
    "ckpt_step": "load=<run>/checkpoints/iter_...",
    "ckpt_format": "torch_dist, which is always used",
    "use_distributed_optimizer": "nothing: it is always on, or the state would not reshard",
    "dist_ckpt_optim_fully_reshardable": "nothing: it is always on, or resuming would be wrong",
    "exit_interval": "train.stop_at",
    "exit_signal_handler": "nothing: it is always on",
    "tensorboard_dir": "logging.tensorboard",
    "distributed_backend": "device",
    "transformer_impl": "backend",
    "use_cpu_initialization": "device",
    "train_data_path": "data.path",
    "valid_data_path": "data.path",
    "test_data_path": "data.path",
    "data_path": "data.path",
    "split": "data.split",
    "data_cache_path": "data.cache_dir",
    "tokenizer_type": "tokenizer.type",
    "tokenizer_model": "tokenizer.path",
    "vocab_size": "model.vocab_size",
    "padded_vocab_size": "model.vocab_size",
    "train_samples": "train.tokens",
    "group_query_attention": "model.num_query_groups",
    "max_position_embeddings": "model.seq_length",
    # These would take checkpoints, their times or the verdict on a run out of megaplug's hands.
    "async_save": "nothing: a checkpoint is only whole once its manifest is written",
    "use_persistent_ckpt_worker": "nothing: checkpoints are saved in the ranks",
    "non_persistent_save_interval": "checkpoint.save_interval",
    "non_persistent_ckpt_type": "checkpoint.save_interval",
    "save_retain_interval": "checkpoint.keep",
    "no_save_optim": "nothing: a run could not be continued",
    "no_save_rng": "nothing: a run could not be continued",
    "exit_signal": "nothing: SIGTERM and SIGINT both save",
    "exit_signal_handler_for_training": "nothing: SIGTERM and SIGINT both save",
    "exit_duration_in_mins": "train.stop_at",
    "phase_transition_iterations": "train.stop_at",
    "skip_train": "train.stop_at",
    "use_checkpoint_args": "load=<run or checkpoint>",
    "dataloader_type": "nothing: it is always single, so that the data order does not depend on dp",
    "reset_attention_mask": "nothing: documents in one sequence are not kept apart yet",
    "fp16": "precision=bf16",
    "yaml_cfg": "a config of your own with --config-dir",
}


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
        **_constants(derived),
        **_lengths(job, derived),
        **_paths(job, facts, folder),
        **_loading(folder, source, resuming),
        **job.megatron,
    }
    table = load_table()
    words = [word for dest, value in values.items() for word in table[dest].render(value)]
    return [*words, *facts.tokenizer_arguments]


def _named(job: Job, topology: Topology) -> Iterator[tuple[str, Any]]:
    """Every key of ours that has a Megatron argument, with its value."""
    for section in _GENERIC:
        config = getattr(job, section)
        if section == "moe" and not config.num_experts:
            continue
        for key in (item.name for item in dataclasses.fields(config)):
            dotted = f"{section}.{key}"
            if dotted in OURS:
                continue
            # A resolved topology knows what an open request left out.
            value = getattr(topology if section == "topology" else config, key)
            yield ALIASES.get(dotted, key), value


def _constants(derived: Derived) -> dict[str, Any]:
    """What megaplug always asks of Megatron, by device and backend."""
    native, on_cpu = derived.backend == "native", derived.device == "cpu"
    values: dict[str, Any] = {
        "transformer_impl": "local" if native else "transformer_engine",
        "group_query_attention": True,
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": True,
        "ckpt_format": "torch_dist",
        "exit_signal_handler": True,
        "dataloader_type": "single",
        # The core attentions are causal by themselves; a mask would be seq_length x seq_length per sequence.
        "create_attention_mask_in_dataloader": False,
        "log_throughput": True,
        "enable_one_logger": False,
        # Megatron's own output layer raises without the extension, with Transformer Engine too.
        "gradient_accumulation_fusion": not on_cpu and has_weight_gradient_fusion(),
    }
    if native:
        # Kernels of Apex and Transformer Engine.
        values |= {
            "no_persist_layer_norm": True,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
        }
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
    return values


def has_weight_gradient_fusion() -> bool:
    """Whether Apex's extension for fused weight gradients is installed; it is not imported."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


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
        f"{split}_data_path": [facts.prefixes[split]]
        for split in ("train", "valid", "test")
        if facts.prefixes.get(split)
    }
    values["data_cache_path"] = str(root / "index_cache")
    values["save"] = str(root / folder.checkpoints.name)
    if job.logging.tensorboard:
        values["tensorboard_dir"] = str(root / folder.tensorboard.name)
    if job.logging.wandb_project is not None:
        values |= {"wandb_exp_name": folder.name, "wandb_save_dir": str(root / "wandb")}
    return values


def _loading(folder: RunFolder, source: Source | None, resuming: bool) -> dict[str, Any]:
    """Which checkpoint the run begins with: its own newest, another run's, or none."""
    if source is None or resuming:
        own = str(folder.checkpoints.resolve())
        # Megatron begins from scratch without a word where a checkpoint is missing.
        return {"load": own, "exit_on_missing_checkpoint": True} if resuming else {"load": own}
    values: dict[str, Any] = {"load": str(source.staging(folder)), "exit_on_missing_checkpoint": True}
    if source.weights_only:
        return values | {"finetune": True, "no_load_optim": True, "no_load_rng": True}
    # The schedule of this job holds, not the one that the other run was given.
    return values | {"override_opt_param_scheduler": True}


def passthrough_problems(job: Job) -> list[Problem]:
    """What is wrong with ``megatron.<argument>=<value>``: unknown, set elsewhere, or of a wrong type."""
    if not job.megatron:
        return []
    table = load_table()
    named = _named_arguments()
    problems = []
    for dest, value in job.megatron.items():
        key = f"megatron.{dest}"
        if dest in named:
            problems.append(Problem(key, f"is set by {named[dest]}", f"write {named[dest]}={value}"))
        elif dest in RESERVED:
            problems.append(Problem(key, "is set by megaplug", f"use {RESERVED[dest]}"))
        elif dest not in table:
            problems.append(Problem(key, "Megatron has no such argument", _meant(dest)))
        elif fault := table[dest].fault(value):
            problems.append(Problem(key, fault, table[dest].help))
    return problems


def _meant(name: str) -> str:
    table = load_table()
    flags = {
        flag.lstrip("-").replace("-", "_"): dest
        for dest, item in table.items()
        for flag in (*item.on, *item.off)
    }
    plain = name.lstrip("-").replace("-", "_")
    if plain in flags:
        argument = table[flags[plain]]
        off = any(flag.lstrip("-").replace("-", "_") == plain for flag in argument.off)
        return f"did you mean megatron.{argument.dest}={'false' if off else '...'}?"
    match = closest(plain, [*table, *flags])
    if match is None:
        return "its arguments are the names in megaplug/job/megatron_arguments.json"
    return f"did you mean megatron.{match if match in table else flags[match]}?"


def _named_arguments() -> dict[str, str]:
    """Megatron's argument by the key of ours that sets it."""
    defaults = Job()
    return {
        ALIASES.get(f"{section}.{item.name}", item.name): f"{section}.{item.name}"
        for section in _GENERIC
        for item in dataclasses.fields(getattr(defaults, section))
        if f"{section}.{item.name}" not in OURS
    } | {"distributed_timeout_minutes": "launch.distributed_timeout_minutes"}
