"""``megatron.<argument>=<value>``: what may be passed to Megatron as it is, and what is set elsewhere."""

from __future__ import annotations

from megaplug.errors import Problem
from megaplug.job.megatron_table import load_table
from megaplug.job.names import argument_keys
from megaplug.job.schema import Job
from megaplug.job.suggest import closest

# Arguments that megaplug gives itself, with what to use instead.
RESERVED = {
    "load": "load=<run or checkpoint>",
    "save": "runs_dir",
    "pretrained_checkpoint": "load=<run or checkpoint>",
    "finetune": "load_state=weights",
    "moe_use_upcycling": "load_state=upcycle",
    "moe_upcycling_granularity": "nothing: it follows from model.ffn_hidden_size and moe.moe_ffn_hidden_size",
    "no_load_optim": "load_state",
    "no_load_rng": "load_state",
    "ckpt_step": "load=<run>/checkpoints/iter_...",
    "ckpt_format": "topology.zero, from which it follows",
    "use_distributed_optimizer": "topology.zero=1, or topology.zero=0 to be without",
    "use_megatron_fsdp": "topology.zero=2 or 3",
    "use_torch_fsdp2": "topology.zero=2 or 3 with topology.fsdp=torch",
    "data_parallel_sharding_strategy": "topology.zero",
    "torch_fsdp2_reshard_after_forward": "topology.zero=3; with topology.zero=2 it is off",
    "dist_ckpt_optim_fully_reshardable": "nothing: it is always on, or resuming would be wrong",
    "exit_interval": "train.stop_at",
    "exit_signal_handler": "nothing: it is always on",
    "tensorboard_dir": "logging.tensorboard",
    "logging_level": "logging.level",
    "profile": "profile=nsys",
    "use_pytorch_profiler": "profile=true",
    "profile_step_start": "profile.wait and profile.warmup",
    "profile_step_end": "profile.active",
    "profile_ranks": "profile.ranks",
    "record_memory_history": "profile=true profile.profile_memory=true",
    "distributed_backend": "device",
    "transformer_impl": "backend",
    "spec": "attention.name",
    "use_cpu_initialization": "device",
    "train_data_path": "data.path",
    "valid_data_path": "data.path",
    "test_data_path": "data.path",
    "data_path": "data.path",
    "split": "data.split",
    "multiple_validation_sets": "data.valid_path with several sources: each has a loss of its own",
    "full_validation": "train.eval_iters, as many as the validation set has",
    **dict.fromkeys(
        (
            "dataloader_fast_cache_load",
            "dataloader_defer_npy_index_mmap",
            "per_dataset_sequences_path",
            "object_storage_cache_path",
        ),
        "nothing: each rank maps the files of data.cache_dir, and reads none from elsewhere",
    ),
    "allow_ambiguous_pad_tokens": "nothing: what means something else as well is not taken for padding",
    "fim_data": "nothing: documents are read as they are, and not rearranged to fill in their middle",
    "data_cache_path": "data.cache_dir",
    "tokenizer_type": "tokenizer.type",
    "tokenizer_model": "tokenizer.path",
    "tiktoken_pattern": "tokenizer.tiktoken_pattern",
    "tiktoken_num_special_tokens": "tokenizer.tiktoken_num_special_tokens",
    "special_tokens": "tokenizer.special_tokens",
    "cuda_graph_scope_deprecated": "cuda_graph.cuda_graph_modules",
    "vocab_size": "model.vocab_size",
    "padded_vocab_size": "model.vocab_size",
    "train_samples": "train.tokens",
    "group_query_attention": "model.num_query_groups",
    "max_position_embeddings": "model.seq_length",
    # These would take checkpoints, their times or the verdict on a run out of megaplug's hands.
    "async_save": "checkpoint.async_save",
    "async_strategy": "checkpoint.async_strategy",
    "use_persistent_ckpt_worker": "checkpoint.async_strategy",
    "non_persistent_save_interval": "checkpoint.save_interval",
    "non_persistent_ckpt_type": "checkpoint.save_interval",
    "save_retain_interval": "checkpoint.keep_every",
    "no_save_optim": "nothing: a run could not be continued",
    "no_save_rng": "nothing: a run could not be continued",
    "exit_signal": "nothing: SIGTERM, SIGINT and SIGUSR2 all save",
    "exit_signal_handler_for_training": "nothing: SIGTERM, SIGINT and SIGUSR2 all save",
    "exit_duration_in_mins": "train.stop_at",
    "phase_transition_iterations": "train.stop_at",
    "skip_train": "train.stop_at",
    # Read by Megatron-LM's own scripts only; here a failure ends the group of all ranks.
    **dict.fromkeys(
        (
            "inprocess_restart",
            "inprocess_max_iterations",
            "inprocess_granularity",
            "inprocess_active_world_size",
            "inprocess_empty_cuda_cache",
        ),
        "watch.max_restarts, which starts the ranks anew from the last checkpoint",
    ),
    "use_checkpoint_args": "load=<run or checkpoint>",
    "dataloader_type": "nothing: it is always single, so that the data order does not depend on dp",
    # Documents that share a sequence.
    **dict.fromkeys(
        (
            "reset_attention_mask",
            "dataloader_inter_document_masking",
            "rl_use_sequence_packing",
            "hybrid_context_parallel",
            "sft",
        ),
        "nothing: documents in one sequence are not kept apart yet",
    ),
    "yaml_cfg": "a config of your own with --config-dir",
}


def passthrough_problems(job: Job) -> list[Problem]:
    """What is wrong with ``megatron.<argument>=<value>``: unknown, set elsewhere, or of a wrong type."""
    if not job.megatron:
        return []
    table = load_table()
    named = argument_keys()
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
