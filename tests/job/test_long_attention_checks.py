"""What ring and dilated attention cannot do is refused by name before anything is launched."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import yaml
from job_factory import small_job

from megaplug.job.checks import check
from megaplug.job.schema import AttentionConfig

BASE = functools.cache(small_job)


@pytest.mark.parametrize("attention", ["ring", "ring_dilated"])
def test_sequences_may_be_split(attention):
    assert check(small_job(f"attention={attention}", "topology.cp=4")) == []


@pytest.mark.parametrize(
    ("words", "key", "text"),
    [
        (["attention=dilated", "topology.cp=2"], "topology.cp", "attention=ring and ring_dilated can"),
        (["attention=ring", "model.attention_dropout=0.1"], "model.attention_dropout", "has no dropout; 0.1"),
        (["attention=ring_dilated", "model.attention_dropout=0.1"], "model.attention_dropout", "no dropout"),
        (["attention=ring", "+megatron.window_size=[8,0]"], "attention.name", "has no sliding window"),
        (["attention=ring", "topology.cp=3", "topology.world_size=3"], "topology.cp", "multiple of 2 x cp"),
    ],
)
def test_what_they_cannot_do_is_refused_by_name(words, key, text):
    problems = check(small_job(*words))
    assert any(problem.key == key and text in str(problem) for problem in problems), problems


@pytest.mark.parametrize("attention", ["ring", "dilated", "ring_dilated", "flash"])
@pytest.mark.parametrize(
    ("word", "key", "text"),
    [
        ("softmax_type=learnable", "megatron.softmax_type", "no attention sinks"),
        ("softmax_type=off-by-one", "megatron.softmax_type", "no off-by-one softmax"),
        ("qk_clip=true", "megatron.qk_clip", "largest score"),
        ("log_max_attention_logit=true", "megatron.log_max_attention_logit", "largest score"),
        ("batch_invariant_mode=true", "megatron.batch_invariant_mode", "depend on the batch"),
        ("create_attention_mask_in_dataloader=true", "attention.name", "has no arbitrary mask"),
        ("cp_comm_type=a2a", "megatron.cp_comm_type", "does not heed it"),
        ("hierarchical_context_parallel_sizes=[2,1]", "megatron.hierarchical_context_parallel_sizes", "heed"),
        ("window_size=(8,0)", "attention.name", "has no sliding window"),
        ("reset_attention_mask=true", "megatron.reset_attention_mask", "not kept apart"),
        ("dataloader_inter_document_masking=true", "megatron.dataloader_inter_document_masking", "apart"),
        ("rl_use_sequence_packing=true", "megatron.rl_use_sequence_packing", "not kept apart"),
        ("sft=true", "megatron.sft", "not kept apart"),
        ("is_hybrid_model=true", "megatron.is_hybrid_model", "does not build"),
        ("experimental_attention_variant=dsa", "megatron.experimental_attention_variant", "does not build"),
    ],
)
def test_what_megatron_can_be_asked_for_is_refused_by_name_before_launch(attention, word, key, text):
    """One message each; what layers would refuse only when ranks have started (``refusals.py``)."""
    name, _, value = word.partition("=")
    job = dataclasses.replace(BASE(), attention=AttentionConfig(attention))
    assert check(job) == []
    problems = check(dataclasses.replace(job, megatron={name: yaml.safe_load(value)}))
    assert [problem.key for problem in problems] == [key]
    assert text in str(problems[0])


def test_megatrons_own_attention_has_sinks_windows_and_masks():
    asked = {"softmax_type": "learnable", "window_size": "(8,0)", "create_attention_mask_in_dataloader": True}
    assert check(dataclasses.replace(BASE(), attention=AttentionConfig("local"), megatron=asked)) == []


@pytest.mark.parametrize("attention", ["ring", "dilated", "ring_dilated", "flash", "local"])
def test_multi_token_prediction_is_refused_where_its_layers_would_have_another_attention(attention):
    """Megatron builds them with its own dense one, in silence, or dies in every rank where cp is above 1."""
    job = dataclasses.replace(BASE(), attention=AttentionConfig(attention), megatron={"mtp_num_layers": 1})
    problems = check(job)
    if attention in ("flash", "local"):
        assert problems == []
        return
    assert [problem.key for problem in problems] == ["megatron.mtp_num_layers"]
    assert "its own dense attention" in problems[0].message
    normed = dataclasses.replace(job, attention=AttentionConfig("flash", sub_layer_norm=True))
    assert [problem.key for problem in check(normed)] == ["attention.sub_layer_norm"]


def test_native_layers_of_multi_token_prediction_split_no_sequence():
    job = small_job("attention=te", "topology.cp=2", "backend=native", "megatron.mtp_num_layers=1")
    assert [(p.key, p.hint) for p in check(job) if "split" in p.message] == [
        ("topology.cp", "use backend=te, or leave megatron.mtp_num_layers out")
    ]
    assert not [p for p in check(dataclasses.replace(job, backend="te")) if p.key == "topology.cp"]


@pytest.mark.parametrize(
    ("param", "value", "device", "text"),
    [
        ("kernel", "cuda_flash", "cpu", "kernel=cuda_flash does not run on cpu"),
        ("kernel", "flash_attn2", "cpu", "use kernel=auto or cpu_flash or reference"),
        ("kernel", "cpu_flash", "cuda", "kernel=cpu_flash does not run on cuda"),
        ("kernel", "cudnn", "cuda", "kernel=cudnn has no fp32, only bf16 and fp16"),
        ("merge", "triton", "cpu", "merge=triton does not run on cpu"),
    ],
)
def test_a_kernel_of_another_device_or_format_is_refused_before_the_start(param, value, device, text):
    job = dataclasses.replace(BASE(), attention=AttentionConfig("ring", {param: value}))
    (problem,) = check(job, device=device)
    assert problem.key == f"attention.params.{param}" and not problem.lacks
    assert text in str(problem)
    assert check(job) == [], "asked where the device is known only"


def test_the_kernels_of_a_device_are_possible_on_it():
    base = dataclasses.replace(BASE(), attention=AttentionConfig("dilated", {"kernel": "cpu_flash"}))
    assert check(base, device="cpu") == []
    half = dataclasses.replace(base.precision, bf16=True)
    for name in ("cuda_flash", "cudnn", "efficient", "reference", "auto"):
        job = dataclasses.replace(base, attention=AttentionConfig("ring", {"kernel": name}), precision=half)
        assert check(job, device="cuda") == [], name


@pytest.mark.parametrize(
    ("params", "key", "text"),
    [
        (["segment_lengths=[64,256]"], "dilation_rates", "2 segment_lengths and 0 dilation_rates"),
        (["segment_lengths=[64,0]", "dilation_rates=[1,2]"], "segment_lengths", "0 is no number of tokens"),
        (
            ["segment_lengths=[64]", "dilation_rates=[1.5]"],
            "dilation_rates",
            "1.5 is no rate: each takes every so many-th token",
        ),
        (["segment_lengths=64"], "segment_lengths", "list is needed"),
        (["token_layout=striped"], "token_layout", "zigzag, contiguous"),
        (["segment_lengths=[64]", "dilation_rates=[0]"], "dilation_rates", "such as [1,2,4]"),
        (["offset=3"], "offset", "one of: kv_group, query_head, torchscale_block"),
        (["offset=head"], "offset", "kv_group, query_head, torchscale_block"),
        (["blocksize=3"], "blocksize", "did you mean 'block_size'"),
        (["block_size=0"], "block_size", "0 is no number of tokens"),
    ],
)
def test_patterns_that_cannot_be_are_refused(params, key, text):
    problems = check(small_job("attention=ring_dilated", *(f"attention.params.{each}" for each in params)))
    assert [problem.key for problem in problems] == [f"attention.params.{key}"]
    assert text in str(problems[0])
