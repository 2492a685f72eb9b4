"""Megatron's own parser reads back what the job says."""

from __future__ import annotations

import dataclasses
import enum
import sys
from typing import Any

import pytest
from job_factory import FOLDER, resolved

from megaplug.job.checks import check
from megaplug.job.compose import compose_job
from megaplug.job.megatron_table import load_table
from megaplug.job.names import ALIASES, OURS
from megaplug.job.passthrough import RESERVED, passthrough_problems
from megaplug.job.translate import megatron_arguments

JOBS = {
    "default": "",
    "bf16 on four": "topology=tp2_pp2 precision=bf16",
    "interleaved": "topology.pp=2 topology.vpp=2",
    "uneven": "topology.pp=2 topology.decoder_first_pipeline_num_layers=1",
    "experts": "moe=small topology.ep=2 moe.moe_expert_capacity_factor=1.5 moe.moe_layer_freq=2",
    "llama": "model=llama3_8b topology.tp=8 train.micro_batch_size=1 train.epochs=3 train.iters=null",
    "latent": "model=deepseek_v3 topology.ep=2 train.micro_batch_size=1",
    "yarn": "model.position_embedding_type=yarn model.rotary_scaling_factor=4 model.yarn_beta_fast=16",
    "linear": "model.rotary_seq_len_interpolation_factor=2",
    "groups": "moe=small moe.moe_router_num_groups=2 moe.moe_router_group_topk=1",
    "recompute": "train.recompute_granularity=full train.recompute_method=block train.recompute_num_layers=1",
    "selective": "train.recompute_granularity=selective train.recompute_modules=[mlp,layernorm]",
    "biases": "model.add_bias_linear=true model.normalization=LayerNorm model.swiglu=false lr=wsd",
    "squared relu": "model.swiglu=false model.squared_relu=true",
    "constant": "lr=constant logging.wandb_project=mine train.deterministic_mode=true",
    "layers of experts": "moe=small moe.layers=[2,3] moe.moe_z_loss_coeff=1e-3 "
    "moe.moe_expert_capacity_factor=1.5 moe.moe_token_drop_policy=position "
    "moe.moe_pad_expert_input_to_capacity=true "
    "moe.moe_shared_expert_intermediate_size=64 moe.moe_shared_expert_gate=true",
    "passthrough": "megatron.num_workers=3 megatron.bias_dropout_fusion=true megatron.iterations_to_skip=[3]",
}


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["megaplug", *words])
    return parse_args()


@pytest.mark.parametrize("line", JOBS.values(), ids=JOBS.keys())
def test_megatron_reads_every_key_as_it_was_meant(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job, topology, derived, facts = resolved(*line.split())
    args = parse(megatron_arguments(job, topology, derived, facts, FOLDER), monkeypatch)
    expected = {}
    for section in ("model", "moe", "train", "optimizer", "lr", "precision", "logging"):
        if section == "moe" and not job.moe.num_experts:
            continue
        for key, value in dataclasses.asdict(getattr(job, section)).items():
            if f"{section}.{key}" not in OURS:
                expected[ALIASES.get(f"{section}.{key}", key)] = value
    expected |= {
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "num_virtual_stages_per_pipeline_rank": topology.vpp,
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": topology.etp,
        "sequence_parallel": topology.sequence_parallel,
        "train_iters": derived.iters,
        "eval_iters": derived.eval_iters,
        "save_interval": derived.save_interval,
        "padded_vocab_size": derived.padded_vocab_size,
        "max_position_embeddings": job.model.seq_length,
        **job.megatron,
    }
    table = load_table()
    for dest, value in expected.items():
        if value is None:
            value = table[dest].default
        found = getattr(args, dest)
        found = found.name if isinstance(found, enum.Enum) else found
        if dest in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
            found = found[0]  # one value of a list
        if dest == "moe_layer_freq":
            value = int(value) if str(value).isdigit() else [0] * 3 + [1] * 58
            value = value if job.moe.layers is None else [0, 1, 1, 0]
        assert found == value, f"{dest} is {found!r}, not {value!r}"


def test_latent_attention_is_asked_for_without_groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron refuses both at once, and calls its fused RoPE for it experimental."""
    args = parse(megatron_arguments(*resolved(*JOBS["latent"].split()), FOLDER), monkeypatch)
    assert args.multi_latent_attention
    assert not args.group_query_attention
    assert not args.apply_rope_fusion


def test_the_arguments_that_keep_state_right_are_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(megatron_arguments(*resolved(), FOLDER), monkeypatch)
    assert args.use_distributed_optimizer
    assert args.dist_ckpt_optim_fully_reshardable
    assert args.ckpt_format == "torch_dist"
    assert args.exit_signal_handler
    assert not args.create_attention_mask_in_dataloader
    assert not args.override_opt_param_scheduler


def test_cpu_and_cuda_differ_in_backend_and_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = parse(megatron_arguments(*resolved(device="cpu"), FOLDER), monkeypatch)
    cuda = parse(megatron_arguments(*resolved(device="cuda"), FOLDER), monkeypatch)
    assert (cpu.distributed_backend, cuda.distributed_backend) == ("gloo", "nccl")
    assert cpu.use_cpu_initialization and not cuda.use_cpu_initialization
    assert (cpu.num_workers, cuda.num_workers) == (0, 2)
    assert not cuda.gradient_accumulation_fusion
    assert cuda.transformer_impl == "local"


@pytest.mark.parametrize(
    ("words", "fused"),
    [
        (["model.swiglu=false", "model.add_bias_linear=true"], True),
        (["model.swiglu=false"], False),
        (["model.swiglu=false", "model.squared_relu=true"], False),
        ([], True),
    ],
)
def test_gelu_is_fused_on_cuda_where_megatron_does_not_refuse_it(
    words: list[str], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, topology, derived, facts = resolved(*words, device="cuda")
    args = parse(megatron_arguments(job, topology, derived, facts, FOLDER), monkeypatch)
    assert args.bias_gelu_fusion is fused


def test_stopping_for_now_is_an_exit_interval_and_not_a_shorter_run(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(megatron_arguments(*resolved("train.iters=20", "train.stop_at=10"), FOLDER), monkeypatch)
    assert (args.exit_interval, args.train_iters) == (10, 20)


def test_a_run_with_a_checkpoint_must_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = parse(megatron_arguments(*resolved(), FOLDER), monkeypatch)
    again = parse(megatron_arguments(*resolved(), FOLDER, resuming=True), monkeypatch)
    assert fresh.load == again.load == fresh.save
    assert (fresh.exit_on_missing_checkpoint, again.exit_on_missing_checkpoint) == (False, True)


def test_passthrough_changes_what_megaplug_only_suggests(monkeypatch: pytest.MonkeyPatch) -> None:
    words = megatron_arguments(*resolved("megatron.num_workers=5", "megatron.log_throughput=false"), FOLDER)
    args = parse(words, monkeypatch)
    assert args.num_workers == 5
    assert not args.log_throughput


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("megatron.num_layers=3", "model.num_layers"),
        ("megatron.tensor_model_parallel_size=2", "topology.tp"),
        ("megatron.layernorm_epsilon=1e-6", "model.norm_epsilon"),
        ("megatron.save=/tmp", "runs_dir"),
        ("megatron.tiktoken_pattern=v1", "tokenizer.tiktoken_pattern"),
        ("megatron.special_tokens=[x]", "tokenizer.special_tokens"),
        ("megatron.tiktoken_num_special_tokens=7", "tokenizer.tiktoken_num_special_tokens"),
        ("megatron.use_distributed_optimizer=false", "use topology.zero="),
        ("megatron.overlap_grad_reduc=true", "overlap_grad_reduce"),
        ("megatron.no_rope_fusion=true", "megatron.apply_rope_fusion=false"),
        ("megatron.full_validation=true", "train.eval_iters"),
        ("megatron.multiple_validation_sets=true", "data.valid_path"),
        ("megatron.dataloader_fast_cache_load=true", "data.cache_dir"),
        ("megatron.dataloader_defer_npy_index_mmap=true", "data.cache_dir"),
        ("megatron.per_dataset_sequences_path=x.json", "data.cache_dir"),
        ("megatron.object_storage_cache_path=x", "data.cache_dir"),
        ("megatron.allow_ambiguous_pad_tokens=true", "is not taken for padding"),
        ("megatron.fim_data=true", "not rearranged"),
        ("megatron.num_workers=some", "whole number"),
        ("megatron.timing_log_option=loud", "minmax"),
    ],
)
def test_a_wrong_passthrough_is_told_what_is_right(word: str, says: str) -> None:
    problems = passthrough_problems(compose_job([word]))
    assert len(problems) == 1
    assert problems[0].key == word.split("=")[0]
    assert says in str(problems[0])
    assert problems[0] in check(compose_job([word]))


def test_names_in_our_tables_are_megatron_s() -> None:
    table = load_table()
    assert set(ALIASES.values()) <= set(table)
    assert set(RESERVED) <= set(table)


@pytest.mark.parametrize(("words", "fused"), [([], True), (["model.add_bias_linear=true"], False)])
def test_experts_with_biases_are_not_given_the_fused_swiglu_that_has_none(
    words: list[str], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, topology, derived, facts = resolved("moe=small", *words, device="cuda")
    args = parse(megatron_arguments(job, topology, derived, facts, FOLDER), monkeypatch)
    assert args.bias_swiglu_fusion is fused
