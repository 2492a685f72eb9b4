"""Single values: names that must be one of a few, and numbers that must lie in a range."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from megaplug.errors import Problem
from megaplug.job.checks_cluster import cluster_problems
from megaplug.job.megatron_table import load_table
from megaplug.job.names import ALIASES, OURS
from megaplug.job.schema import Job, TokenizerConfig
from megaplug.job.sources import source_problems
from megaplug.job.suggest import did_you_mean

# What can be written for the keys that never reach Megatron, or that it takes more of than is supported here.
CHOICES: dict[str, tuple[str, ...]] = {
    "load_state": ("weights", "all", "upcycle"),
    "backend": ("auto", "native", "te"),
    "device": ("auto", "cpu", "cuda"),
    "cluster.device": ("cuda", "cpu"),
    "data.bad_lines": ("refuse", "skip"),
    "kernels.apex": ("auto", "off", "require"),
    "kernels.te": ("auto", "off", "require"),
    "tokenizer.type": ("byte", "huggingface", "sentencepiece", "tiktoken"),
    "topology.fsdp": ("megatron", "torch"),
    # Megatron's distributed optimizer, which is always on, takes no other of torch's own.
    "optimizer.optimizer": ("adam",),
    "logging.level": ("debug", "info", "warning", "error"),
    "profile.kind": ("none", "torch", "nsys"),
    "logging.progress": ("auto", "rich", "plain", "none"),
    # The third that Megatron's parser knows, report_stats, is none of its machine's: it raises ValueError.
    "resilience.rerun_mode": ("disabled", "validate_results"),
    "launch.kind": ("local", "nodes", "slurm", "print", "freeze"),
    "launch.output": ("text", "json"),
    "slurm.container": ("none", "pyxis", "apptainer"),
    "sweep.kind": ("grid", "optuna"),
    "sweep.metric": ("valid_loss", "loss"),
    "checkpoint.async_strategy": ("mcore", "nvrx"),
    "model.position_embedding_type": ("rope", "yarn", "learned_absolute", "none"),
    "moe.moe_token_dispatcher_type": ("alltoall", "allgather", "flex"),
    "moe.moe_flex_dispatcher_backend": ("deepep", "hybridep"),
    "moe.moe_token_drop_policy": ("probs", "position"),
}

_POSITIVE = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
    "model.num_query_groups", "model.kv_channels", "model.seq_length", "model.vocab_size",
    "model.make_vocab_size_divisible_by", "model.norm_epsilon", "model.rotary_base",
    "model.rope_scaling_factor", "model.rotary_seq_len_interpolation_factor", "model.rotary_scaling_factor",
    "model.yarn_original_max_position_embeddings", "model.yarn_beta_fast", "model.yarn_beta_slow",
    "model.q_lora_rank", "model.kv_lora_rank", "model.qk_head_dim", "model.qk_pos_emb_head_dim",
    "model.v_head_dim", "moe.moe_router_topk_scaling_factor", "moe.moe_router_num_groups",
    "moe.moe_router_group_topk",
    "moe.moe_ffn_hidden_size", "moe.moe_router_topk", "moe.moe_expert_capacity_factor",
    "train.iters", "train.tokens", "train.epochs", "train.stop_at", "train.micro_batch_size",
    "train.global_batch_size", "train.eval_interval", "train.recompute_num_layers",
    "optimizer.adam_eps", "lr.lr", "lr.lr_decay_iters", "lr.lr_wsd_decay_iters",
    "checkpoint.save_interval", "checkpoint.keep", "checkpoint.keep_every", "logging.log_interval",
    "logging.peak_tflops", "profile.active", "profile.repeat",
    "precision.loss_scale", "precision.initial_loss_scale", "precision.min_loss_scale",
    "precision.loss_scale_window", "precision.hysteresis",
    "train.early_stop_patience", "train.loss_chunk_tokens", "alerts.timeout_s",
    "launch.omp_num_threads", "launch.nnodes", "launch.join_s", "launch.grace_s",
    "slurm.cpus_per_task", "slurm.signal_s", "slurm.chain", "launch.at_once", "sweep.trials",
    "launch.distributed_timeout_minutes",
    "tokenizer.tiktoken_num_special_tokens",
)  # fmt: skip
_NOT_NEGATIVE = (
    "moe.num_experts", "moe.moe_aux_loss_coeff", "moe.moe_z_loss_coeff", "train.eval_iters", "train.seed",
    "optimizer.weight_decay",
    "optimizer.clip_grad", "lr.min_lr", "lr.lr_warmup_iters", "lr.lr_warmup_fraction",
    "model.init_method_std", "profile.wait", "profile.warmup", "train.cpu_offloading_num_layers",
    "optimizer.optimizer_offload_fraction", "model.mscale", "model.mscale_all_dim",
    "train.early_stop_min_delta", "resilience.error_injection_rate", "watch.max_restarts",
    "moe.moe_router_bias_update_rate", "watch.hang_s", "watch.start_s", "watch.first_step_s", "watch.save_s",
    "checkpoint.keep_best", "launch.max_gpu_hours", "sweep.startup_trials", "sweep.seed",
)  # fmt: skip
# From 0 up to but without 1.
_FRACTIONS = (
    "model.attention_dropout", "model.hidden_dropout", "optimizer.adam_beta1", "optimizer.adam_beta2",
)  # fmt: skip
# Beyond these nobody trains, and checks that go through sizes one by one would not end.
_AT_MOST = {
    "model.num_layers": 10_000,
    **{f"topology.{key}": 2**20 for key in ("world_size", "tp", "pp", "vpp", "cp", "dp", "ep", "etp")},
}

_MEGATRON_SECTIONS = (
    "model", "moe", "train", "optimizer", "lr", "precision", "overlap", "cuda_graph",
    "resilience",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def value_problems(job: Job) -> list[Problem]:
    """Everything that is wrong with single values."""
    return [
        *_choices(job),
        *_numbers(job),
        *_megatron_choices(job),
        *_texts(job),
        *cluster_problems(job),
    ]


def value_of(job: Job, dotted: str) -> Any:
    """The value of a key such as ``train.iters``."""
    value: Any = job
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _choices(job: Job) -> Iterator[Problem]:
    for key, known in CHOICES.items():
        value = value_of(job, key)
        if value is not None and value not in known:
            yield Problem(key, f"cannot be {value!r}", did_you_mean(str(value), known))


def _megatron_choices(job: Job) -> Iterator[Problem]:
    """Values that Megatron's own parser would refuse."""
    table = load_table()
    for section in _MEGATRON_SECTIONS:
        for item in dataclasses.fields(getattr(job, section)):
            key = f"{section}.{item.name}"
            if key in OURS or key in CHOICES:
                continue
            argument = table[ALIASES.get(key, item.name)]
            value = value_of(job, key)
            # An empty list is not written out: it leaves Megatron's default.
            if value != [] and (fault := argument.fault(value)):
                yield Problem(key, fault, did_you_mean(str(value), map(str, argument.choices or ()), show=0))


def _numbers(job: Job) -> Iterator[Problem]:
    for key in (*_POSITIVE, *_NOT_NEGATIVE, *_FRACTIONS):
        value = value_of(job, key)
        if value is None:
            continue
        if not math.isfinite(value):
            yield Problem(key, f"must be a finite number, but is {value}")
        elif key in _POSITIVE and value <= 0:
            yield Problem(key, f"must be above 0, but is {value}")
        elif key in _NOT_NEGATIVE and value < 0:
            yield Problem(key, f"must not be negative, but is {value}")
        elif key in _FRACTIONS and not 0 <= value < 1:
            yield Problem(key, f"must be at least 0 and below 1, but is {value}")
    for key, most in _AT_MOST.items():
        if (value := value_of(job, key)) is not None and value > most:
            yield Problem(key, f"can be {most:,} at most, but is {value:,}")
    if not 0 < job.model.rotary_percent <= 1:
        yield Problem(
            "model.rotary_percent", f"must be above 0 and at most 1, but is {job.model.rotary_percent}"
        )
    port = job.launch.master_port
    if port is not None and not 1 <= port <= 65535:
        yield Problem("launch.master_port", f"must be between 1 and 65535, but is {port}")


def _texts(job: Job) -> Iterator[Problem]:
    if not _NAME.fullmatch(job.name):
        yield Problem("name", f"{job.name!r} cannot be a folder's name", "use letters, digits, dots, - and _")
    yield from source_problems(job.data)
    parts = job.data.split.replace(" ", "").split(",")
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    right = 1 <= len(weights) <= 3 and all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not right or weights[0] <= 0:
        message = f"{job.data.split!r} is not a split"
        yield Problem(
            "data.split", message, "give the parts for train,valid,test, such as 95,5,0; train cannot be 0"
        )
    yield from _tokenizer(job)


_TOKENIZER_FILES = {
    "huggingface": "a tokenizer.json",
    "sentencepiece": "a .model of SentencePiece",
    "tiktoken": "a rank file of tiktoken",
}


def _tokenizer(job: Job) -> Iterator[Problem]:
    """Keys of a tokenizer that it lacks, and keys of another kind of tokenizer."""
    config = job.tokenizer
    if config.type in _TOKENIZER_FILES and config.path is None:
        hint = f"name {_TOKENIZER_FILES[config.type]} or a folder that holds one"
        yield Problem("tokenizer.path", "is not given", hint)
    if config.type == "byte" and config.eod is not None:
        yield Problem(
            "tokenizer.eod", f"is {config.eod!r}, but a byte tokenizer has its own", "leave it away"
        )
    default = TokenizerConfig()
    for key in ("tiktoken_pattern", "special_tokens", "tiktoken_num_special_tokens"):
        if config.type != "tiktoken" and getattr(config, key) != getattr(default, key):
            yield Problem(f"tokenizer.{key}", f"means nothing with tokenizer={config.type}", "leave it away")
