"""Layers of several attentions in one model: what the keys mean, and what is refused before launch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import yaml
from job_factory import resolved, small_job

from megaplug.errors import UserError
from megaplug.job.attention import attention_layers
from megaplug.job.checks import check, job_shape
from megaplug.job.elsewhere import te_needed_for
from megaplug.job.identity import differing_keys, digest, identity, model_fingerprint
from megaplug.layers.registry import AttentionLayers
from megaplug.plan.attention_memory import attention_memory
from megaplug.plan.parameters import total_parameters
from megaplug.plan.rehearsal.frozen import rehearsed_job
from megaplug.plan.workload import workload_of

MIXED = ["attention=ring_dilated", "attention.pattern=[ring,ring,ring_dilated]"]

composed = functools.cache(small_job)


def changed(*words: str) -> Any:
    """The job of the words ``key=value``; composing each anew would take a fifth of a second."""
    job = copy.deepcopy(composed())
    for word in words:
        key, _, value = word.partition("=")
        key = "attention.name" if key == "attention" else key
        *way, last = key.split(".")
        part: Any = job
        for name in way:
            part = part.setdefault(name, {}) if isinstance(part, dict) else getattr(part, name)
        value = yaml.safe_load(value)
        part.update({last: value}) if isinstance(part, dict) else setattr(part, last, value)
    return job


def test_a_unit_of_names_is_repeated_over_the_layers_each_with_its_own_parameters():
    job = small_job(
        *MIXED,
        "attention.params={segment_lengths:[16,64],dilation_rates:[1,2]}",
        "attention.pattern_params.ring.kernel=reference",
    )
    assert check(job) == []
    layers = attention_layers(job.attention)
    assert [layers.name_of(n) for n in range(5)] == ["ring", "ring", "ring_dilated", "ring", "ring"]
    assert layers.params_of("ring") == {"kernel": "reference"}
    assert layers.params_of("ring_dilated") == {"segment_lengths": [16, 64], "dilation_rates": [1, 2]}
    assert layers.counts(8) == {"ring": 6, "ring_dilated": 2}
    assert layers.described(8) == "attention ring in 6, ring_dilated in 2 of 8 layers"
    assert layers.described(2) == "ring attention"


def test_without_a_pattern_all_layers_are_alike():
    layers = attention_layers(changed("attention=ring", "attention.params.kernel=reference").attention)
    assert layers == AttentionLayers.alike("ring", {"kernel": "reference"})
    assert layers.described(4) == "ring attention"


@pytest.mark.parametrize(
    ("words", "key", "text"),
    [
        (
            ["attention.pattern=[ring,dilated]"],
            "pattern",
            "names ring and dilated, and not attention.name=flash",
        ),
        (["attention.pattern=[]"], "pattern", "names nothing"),
        (["attention.pattern=[flash,rign]"], "pattern", "did you mean 'ring'"),
        (
            ["attention.pattern=[flash,local,flash,local,flash]"],
            "pattern",
            "names 5 layers, and the model has 4",
        ),
        ([*MIXED, "attention.pattern_params.ring.kernal=auto"], "pattern_params.ring.kernal", "'kernel'"),
        ([*MIXED, "attention.pattern_params.ring=3"], "pattern_params.ring", "parameters by name, not 3"),
        ([*MIXED, "attention.pattern_params.flash.x=1"], "pattern_params.flash", "no layer has"),
        (
            [*MIXED, "attention.pattern_params.ring_dilated.offset=1"],
            "pattern_params.ring_dilated",
            "use attention.params",
        ),
        (["attention.pattern_params.flash.x=1"], "pattern_params", "attention.pattern, which is null"),
        ([*MIXED, "attention.params.dilation_rates=[3]"], "params.dilation_rates", "0 segment_lengths"),
    ],
)
def test_patterns_that_make_no_sense_are_refused_by_key(words, key, text):
    problems = check(changed(*words))
    assert [problem.key for problem in problems] == [f"attention.{key}"]
    assert text in str(problems[0])


@pytest.mark.parametrize("dense", ["flash", "local", "dilated"])
def test_every_layers_attention_has_to_be_able_to_do_what_is_asked(dense):
    words = ["attention=ring_dilated", f"attention.pattern=[{dense},ring_dilated]"]
    assert check(changed(*words)) == []
    problems = check(changed(*words, "topology.cp=2"))
    assert [problem.key for problem in problems] == ["topology.cp"]
    assert f"{dense!r} cannot split a sequence over 2 ranks" in problems[0].message


def test_dropout_is_refused_of_the_layers_that_have_none():
    words = ["attention=local", "attention.pattern=[local,ring]", "model.attention_dropout=0.1"]
    messages = [problem.message for problem in check(changed(*words))]
    assert len(messages) == 1 and "'ring' has no dropout" in messages[0]


def test_layers_that_spread_tokens_have_one_layout():
    contiguous = [*MIXED, "attention.params.token_layout=contiguous"]
    problems = check(changed(*contiguous))
    assert [problem.key for problem in problems] == ["attention.pattern_params.ring.token_layout"]
    assert "use attention.pattern_params.ring.token_layout=contiguous" in problems[0].hint
    both = changed(*contiguous, "attention.pattern_params.ring.token_layout=contiguous", "topology.cp=2")
    assert check(both) == []
    assert attention_layers(both.attention).token_layout() == "contiguous"
    with pytest.raises(UserError, match="several layouts: ring zigzag, ring_dilated contiguous"):
        attention_layers(changed(*contiguous).attention).token_layout()


def test_a_layout_does_not_concern_layers_that_never_spread_tokens():
    words = ["attention=ring_dilated", "attention.params.token_layout=contiguous"]
    job = changed(*words, "attention.pattern=[flash,ring_dilated]")
    assert check(job) == []
    assert attention_layers(job.attention).token_layout() == "contiguous"
    # Transformer Engine spreads tokens as Megatron does, once there are ranks to spread them over.
    engine = ["attention.pattern=[te,ring_dilated]", "topology.cp=2"]
    found = [p for p in check(changed(*words, *engine)) if "tokens" in p.message]
    assert not found, "asked only of attentions that can be had"
    layers = attention_layers(changed(*words, *engine).attention)
    assert layers.token_layouts(2) == {"te": "zigzag", "ring_dilated": "contiguous"}
    assert layers.token_layouts(1) == {"ring_dilated": "contiguous"}


def test_multi_token_prediction_is_refused_in_a_pattern_too():
    words = ["attention=flash", "attention.pattern=[flash,dilated]", "megatron.mtp_num_layers=1"]
    (problem,) = check(changed(*words))
    assert problem.key == "megatron.mtp_num_layers" and "'dilated'" in problem.message


def test_every_attention_of_a_pattern_is_asked_what_its_parameters_need():
    words = [*MIXED, "attention.pattern_params.ring.kernel=efficient"]
    (problem,) = check(changed(*words), device="cpu")
    assert problem.key == "attention.pattern_params.ring.kernel"
    assert check(changed(*words), device="cuda") == []


def test_flash_in_a_pattern_keeps_its_own_rules():
    words = [
        "attention=ring",
        "attention.pattern=[ring,flash]",
        "attention.pattern_params.flash.cuda_kernel=cudnn",
    ]
    problems = check(changed(*words), device="cuda")
    assert [p.key for p in problems if "fp32" in p.message] == ["attention.pattern_params.flash.cuda_kernel"]
    half = check(changed(*words, "precision.attention_softmax_in_fp32=false"))
    assert [p.key for p in half] == ["precision.attention_softmax_in_fp32"]


def test_a_pattern_makes_another_run_of_the_same_weights():
    _, *rest = resolved()
    of_ring = "attention.pattern_params.ring.kernel=reference"
    jobs = [changed("attention=ring_dilated"), changed(*MIXED), changed(*MIXED, of_ring)]
    assert len({digest(identity(job, *rest)) for job in jobs}) == 3
    first, *others = [model_fingerprint(job, *rest[1:]) for job in jobs]
    assert others == [first, first]


def test_a_run_without_a_pattern_keeps_its_folder():
    """What runs of earlier versions were named after."""
    values = identity(changed("attention=ring"), *resolved()[1:])["attention"]
    assert values == {"name": "ring", "params": {}}


def test_a_norm_inside_the_attention_is_another_model_and_its_gain_another_run():
    _, *rest = resolved()
    plain, normed, gained = (
        changed(*words) for words in ([], ["attention.sub_layer_norm=true"], ["attention.gamma_init=1.5"])
    )
    assert len({digest(identity(job, *rest)) for job in (plain, normed, gained)}) == 3
    prints = [model_fingerprint(job, *rest[1:]) for job in (plain, normed, gained)]
    assert prints[0] == prints[2]
    differing = [key for key, _, _ in differing_keys(prints[0], prints[1])]
    assert differing == ["attention.sub_layer_norm"]
    layers = attention_layers(changed("attention.sub_layer_norm=true", "attention.gamma_init=1.5").attention)
    assert (layers.sub_layer_norm, layers.gamma_init) == (True, 1.5)
    more = total_parameters(job_shape(normed)) - total_parameters(job_shape(plain))
    assert more == 4 * 2 * 256


def test_the_plan_counts_what_the_norm_keeps():
    _, topology, _, _ = resolved()
    kept = [
        attention_memory(workload_of(job, topology, job_shape(job))).kept
        for job in (changed(), changed("attention.sub_layer_norm=true"))
    ]
    tokens = 4 * 256
    assert kept[1] - kept[0] == tokens * (256 * 4 + 2 * 4)


@pytest.mark.parametrize("word", ["sub_layer_norm=true", "gamma_init=1.5"])
def test_layers_without_a_norm_inside_the_attention_are_refused_before_launch(word):
    key = f"attention.{word.partition('=')[0]}"
    assert check(changed(f"attention.{word}")) == []
    latent = check(changed(f"attention.{word}", "model.multi_latent_attention=true"))
    assert [p.message for p in latent if p.key == key] == ["is not in latent attention"]
    engine = check(changed(f"attention.{word}", "backend=te"), device="cuda")
    assert "use backend=native" in [p.hint for p in engine if p.key == key]


def test_a_gain_is_a_number_above_nothing_and_knows_no_gate():
    assert [p.key for p in check(changed("attention.gamma_init=0"))] == ["attention.gamma_init"]
    gated = check(changed("attention.gamma_init=1", "megatron.attention_output_gate=true"))
    assert [p.key for p in gated] == ["attention.gamma_init"]


def test_transformer_engine_in_one_layer_is_needed_as_in_all():
    job = changed("attention=ring", "attention.pattern=[ring,te]", "model.vocab_size=256")
    assert te_needed_for(job) == "attention.pattern"
    assert te_needed_for(changed(*MIXED)) == ""
    attention = rehearsed_job(job).attention
    assert (attention.name, attention.pattern) == ("ring", ["ring", "flash"])
    normed = changed("attention.sub_layer_norm=true", "attention.gamma_init=2", "model.vocab_size=256")
    assert rehearsed_job(normed).attention == normed.attention


def test_the_plan_counts_scores_where_any_layer_keeps_them():
    _, topology, _, _ = resolved()
    for unit, fused in (("[flash,ring]", True), ("[flash,local]", False)):
        job = changed(f"attention.pattern={unit}")
        assert workload_of(job, topology, job_shape(job)).fused_attention is fused
