"""What makes another run, and what does not."""

from __future__ import annotations

import dataclasses
import json

import pytest
from job_factory import data_facts, resolved

from megaplug.job.identity import differing_keys, digest, identity, model_fingerprint


def digest_of(*words: str, **changes: object) -> str:
    facts = data_facts(**changes)  # type: ignore[arg-type]
    return digest(identity(*resolved(*words, facts=facts)))


@pytest.mark.parametrize(
    "words",
    [
        ["name=other"],
        ["runs_dir=/elsewhere"],
        ["resume=false"],
        ["train.stop_at=10"],
        ["launch=print"],
        ["launch.omp_num_threads=1"],
        ["logging=quiet"],
        ["checkpoint.save_interval=7"],
        ["checkpoint.keep=5"],
        ["checkpoint.keep_every=50", "checkpoint.keep_best=1"],
        ["checkpoint.async_save=false"],
        ["data.cache_dir=/elsewhere"],
        ["data.path=/copy/of/the/same/text"],
        ["megatron.log_num_zeros_in_grad=true"],
        ["logging.log_params_norm=true"],
        ["logging.level=debug"],
        ["profile=true"],
        ["cluster=h100"],
        ["cluster.price_per_gpu_hour=2.5"],
        ["topology.dp=1"],
        ["device=cpu"],
        ["train.iters=null", "train.tokens=1228800"],
    ],
)
def test_where_how_loudly_and_how_far_for_now_do_not_count(words: list[str]) -> None:
    assert digest_of(*words) == digest_of()


@pytest.mark.parametrize(
    "words",
    [
        ["train.iters=301"],
        ["train.seed=1"],
        ["train.global_batch_size=32"],
        ["topology=tp2"],
        ["model.num_layers=5"],
        ["lr.lr=2e-3"],
        ["optimizer.weight_decay=0.2"],
        ["precision=bf16"],
        ["moe=small"],
        ["attention=local"],
        ["megatron.decoupled_lr=1e-3"],
        ["overlap=off"],
        ["train.deterministic_mode=true"],
    ],
)
def test_what_decides_the_result_counts(words: list[str]) -> None:
    assert digest_of(*words) != digest_of()


def test_the_data_counts_by_its_content() -> None:
    assert digest_of(fingerprint="0" * 32) != digest_of()
    assert digest_of(prefixes={"train": "/moved/train", "valid": "/moved/valid"}) == digest_of()


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    values = identity(*resolved())
    assert digest(dict(reversed(values.items()))) == digest(values)
    assert len(digest(values)) == 8


def test_a_model_is_told_apart_by_the_keys_that_differ() -> None:
    tiny = model_fingerprint(*_job_parts())
    wider = model_fingerprint(*_job_parts("model.ffn_hidden_size=704", "model.rotary_base=500000"))
    assert list(differing_keys(tiny, wider)) == [
        ("model.ffn_hidden_size", 688, 704),
        ("model.rotary_base", 10000, 500000),
    ]


YARN = ["model.position_embedding_type=yarn", "model.rotary_scaling_factor=4"]
LATENT = ["model.multi_latent_attention=true", "model.rope_type=rope", "model.num_query_groups=8"]


@pytest.mark.parametrize(
    ("before", "words", "key"),
    [
        (["model.swiglu=false"], ["model.squared_relu=true"], "model.squared_relu"),
        ([], ["model.rotary_seq_len_interpolation_factor=2"], "model.rotary_seq_len_interpolation_factor"),
        (YARN, ["model.rotary_scaling_factor=8"], "model.rotary_scaling_factor"),
        (YARN, ["model.mscale_all_dim=1"], "model.mscale_all_dim"),
        ([*LATENT], ["model.kv_lora_rank=64"], "model.kv_lora_rank"),
        (["moe=small"], ["moe.moe_router_score_function=sigmoid"], "moe.moe_router_score_function"),
        (["moe=small"], ["moe.moe_router_topk_scaling_factor=2"], "moe.moe_router_topk_scaling_factor"),
    ],
)
def test_scaled_rope_latents_and_routing_make_another_model(
    before: list[str], words: list[str], key: str
) -> None:
    ours, theirs = model_fingerprint(*_job_parts(*before)), model_fingerprint(*_job_parts(*before, *words))
    assert [found for found, _, _ in differing_keys(ours, theirs)] == [key]


def test_what_a_model_does_not_use_is_not_in_its_fingerprint() -> None:
    """So checkpoints from before these keys were there still load."""
    keys = {key.partition(".")[2] for key in model_fingerprint(*_job_parts("moe=small"))}
    assert (
        not {"kv_lora_rank", "squared_relu", "rotary_scaling_factor", "mscale", "moe_router_num_groups"}
        & keys
    )


@pytest.mark.parametrize(
    "words", [["topology=tp2"], ["precision=bf16"], ["model.seq_length=128"], ["train.seed=3"]]
)
def test_a_model_is_the_same_under_another_topology_or_schedule(words: list[str]) -> None:
    assert model_fingerprint(*_job_parts(*words)) == model_fingerprint(*_job_parts())


def test_identity_and_fingerprint_are_plain_json() -> None:
    job, topology, derived, facts = resolved("moe=small")
    for values in (identity(job, topology, derived, facts), model_fingerprint(job, derived, facts)):
        assert json.loads(json.dumps(values)) == values


def test_another_tokenizer_is_another_model() -> None:
    job, _, derived, facts = resolved()
    other = dataclasses.replace(facts, tokenizer_fingerprint="else")
    assert model_fingerprint(job, derived, facts) != model_fingerprint(job, derived, other)


def _job_parts(*words: str) -> tuple[object, ...]:
    job, _, derived, facts = resolved(*words)
    return job, derived, facts
