"""The checks name every fault at once, and only faults."""

from __future__ import annotations

import pytest
from job_factory import data_facts, resolved, small_job

from megaplug.job.checks import check, check_facts


def keys_of(*words: str) -> list[str]:
    return [problem.key for problem in check(small_job(*words))]


def test_the_default_job_is_right() -> None:
    assert keys_of() == []


def test_several_impossible_topology_values_are_listed_at_once() -> None:
    problems = check(small_job("topology.tp=3", "topology.pp=3", "topology.ep=2"))
    assert {"topology.tp", "topology.pp", "topology.ep"} <= {problem.key for problem in problems}
    text = "\n".join(map(str, problems))
    assert "8 attention heads" in text and "4 layers" in text
    assert "nearest that fit: topology." in text


def test_a_world_too_small_for_all_that_is_wanted_is_told_the_smallest_that_is_not() -> None:
    words = [f"topology.{size}" for size in ("tp=4", "pp=4", "ep=16", "dp=2", "world_size=16")]
    (product, experts) = check(
        small_job(*words, "moe=small", "moe.num_experts=16", "model.num_query_groups=8")
    )
    assert "4 x pp 4 x cp 1 x dp 2 = 32" in product.message
    assert "nearest that fit: topology.pp=2 topology.ep=8 topology.etp=1  |  " in experts.hint
    suggested = [words.split("topology.etp")[0] for words in experts.hint.split("  |  ")]
    assert len(suggested) == len(set(suggested)) == 3
    smallest = "smallest world for TP4 PP4 CP2 EP16 ETP1 DP2: 64 ranks, topology.cp=2 topology.world_size=64"
    assert smallest in experts.hint


def test_topology_and_schedule_and_passthrough_faults_come_together() -> None:
    keys = keys_of("topology.tp=3", "lr.lr_warmup_iters=5", "megatron.nothing=1", "train.tokens=100")
    assert {"topology.tp", "lr.lr_warmup_iters", "megatron.nothing", "train"} <= set(keys)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train.iters=null"], "train.iters"),
        (["train.tokens=1000"], "train"),
        (["train.iters=0"], "train.iters"),
        (["train.iters=10", "train.stop_at=11"], "train.stop_at"),
        (["train.micro_batch_size=0"], "train.micro_batch_size"),
        (["train.global_batch_size=7"], "train.global_batch_size"),
        (["lr.min_lr=1"], "lr.min_lr"),
        (["lr.lr=inf"], "lr.lr"),
        (["lr.lr_warmup_fraction=null", "lr.lr_warmup_iters=300"], "lr.lr_warmup_iters"),
        (["lr=wsd", "lr.lr_wsd_decay_iters=null"], "lr.lr_wsd_decay_iters"),
        (["lr=wsd", "train.iters=50"], "lr.lr_wsd_decay_iters"),
        (["lr.lr_decay_style=cosin"], "lr.lr_decay_style"),
        (["train.recompute_method=block"], "train.recompute_method"),
        (
            ["train.recompute_modules=[mlp]", "model.add_bias_linear=true"],
            "train.recompute_modules",
        ),
        (
            ["train.recompute_granularity=selective", "train.recompute_modules=[attn]"],
            "train.recompute_modules",
        ),
        (["train.recompute_granularity=some"], "train.recompute_granularity"),
        (["model.attention_dropout=1"], "model.attention_dropout"),
        (["model.normalization=BatchNorm"], "model.normalization"),
        (["optimizer.optimizer=adan"], "optimizer.optimizer"),
        (["attention.name=flish"], "attention.name"),
        (["attention.params.blok=3"], "attention.params.blok"),
        (["backend=tee"], "backend"),
        (["device=gpu"], "device"),
        (["load_state=all"], "load_state"),
        (["load_state=upcycle"], "load_state"),
        (["launch.kind=slrum"], "launch.kind"),
        (["launch.master_port=70000"], "launch.master_port"),
        (["logging.progress=loud"], "logging.progress"),
        (["checkpoint.keep=0"], "checkpoint.keep"),
        (["checkpoint.keep_every=0"], "checkpoint.keep_every"),
        (["checkpoint.keep_best=-1"], "checkpoint.keep_best"),
        (["data.split='0,1,0'"], "data.split"),
        (["data.split=most"], "data.split"),
        (["tokenizer=huggingface", "tokenizer.path=null"], "tokenizer.path"),
        (["tokenizer=sentencepiece"], "tokenizer.path"),
        (["tokenizer=tiktoken"], "tokenizer.path"),
        (["tokenizer.eod='</s>'"], "tokenizer.eod"),
        (
            ["tokenizer=sentencepiece", "tokenizer.path=x", "tokenizer.tiktoken_pattern=v1"],
            "tokenizer.tiktoken_pattern",
        ),
        (["tokenizer.special_tokens=['<e>']"], "tokenizer.special_tokens"),
        (["tokenizer.tiktoken_num_special_tokens=7"], "tokenizer.tiktoken_num_special_tokens"),
        (
            ["tokenizer=tiktoken", "tokenizer.path=x", "tokenizer.tiktoken_num_special_tokens=0"],
            "tokenizer.tiktoken_num_special_tokens",
        ),
        (["name='a/b'"], "name"),
        (["moe=small", "moe.moe_router_load_balancing_type=fair"], "moe.moe_router_load_balancing_type"),
    ],
)
def test_a_fault_is_named_by_its_key(words: list[str], key: str) -> None:
    assert key in keys_of(*words)


def test_a_misspelt_value_is_suggested() -> None:
    (problem,) = check(small_job("lr.lr_decay_style=cosin"))
    assert "did you mean cosine?" in problem.hint


def test_a_tokenizer_that_does_not_fit_the_model_is_refused() -> None:
    job, _, derived, facts = resolved("model.vocab_size=256")
    (problem,) = check_facts(job, derived, facts)
    assert problem.key == "model.vocab_size"
    assert "257" in problem.message and "256" in problem.message


def test_a_larger_vocabulary_than_the_tokenizer_s_is_allowed() -> None:
    job, _, derived, facts = resolved("model.vocab_size=32000")
    assert check_facts(job, derived, facts) == []
    assert derived.padded_vocab_size == 32000


def test_a_schedule_longer_than_the_derived_steps_is_refused() -> None:
    facts = data_facts(num_tokens=50_000)
    job, _, derived, _ = resolved(
        "train.iters=null",
        "train.epochs=1",
        "lr.lr_warmup_fraction=null",
        "lr.lr_warmup_iters=100",
        facts=facts,
    )
    assert derived.iters < 100
    assert [problem.key for problem in check_facts(job, derived, facts)] == ["lr.lr_warmup_iters"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["attention.params.cuda_kernel=flash"], "torch's flash kernel has no fp32"),
        (
            ["attention.params.cuda_kernel=cudnn", "precision=bf16", "train.deterministic_mode=true"],
            "not determin",
        ),
        (["attention.params.cuda_kernel=flash", "precision=bf16", "train.deterministic_mode=true"], ""),
        (["attention.params.cuda_kernel=efficient", "train.deterministic_mode=true"], ""),
    ],
)
def test_a_fused_kernel_that_would_refuse_on_a_gpu_is_refused_before(words: list[str], says: str) -> None:
    found = [str(problem) for problem in check(small_job(*words), device="cuda")]
    assert says in "".join(found) and bool(found) == bool(says)
    assert check(small_job(*words), device="cpu") == []
