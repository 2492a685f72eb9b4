"""What ring and dilated attention cannot do is refused by name before anything is launched."""

from __future__ import annotations

import pytest
from job_factory import small_job

from megaplug.job.checks import check


@pytest.mark.parametrize("attention", ["ring", "ring_dilated"])
def test_sequences_may_be_split(attention):
    assert check(small_job(f"attention={attention}", "topology.cp=4")) == []


@pytest.mark.parametrize(
    ("words", "key", "text"),
    [
        (["attention=dilated", "topology.cp=2"], "topology.cp", "attention=ring and ring_dilated can"),
        (["attention=ring", "model.attention_dropout=0.1"], "model.attention_dropout", "has no dropout"),
        (["attention=ring_dilated", "model.attention_dropout=0.1"], "model.attention_dropout", "no dropout"),
        (["attention=ring", "+megatron.window_size=[8,0]"], "attention.name", "has no sliding window"),
        (["attention=ring", "topology.cp=3", "topology.world_size=3"], "topology.cp", "multiple of 2 x cp"),
    ],
)
def test_what_they_cannot_do_is_refused_by_name(words, key, text):
    problems = check(small_job(*words))
    assert any(problem.key == key and text in str(problem) for problem in problems), problems


def test_contiguous_tokens_are_refused_with_multi_token_prediction():
    words = ["attention=ring_dilated", "topology.cp=2", "+megatron.mtp_num_layers=1"]
    assert not [p for p in check(small_job(*words)) if "token_layout" in p.key]
    problems = check(small_job(*words, "attention.params.token_layout=contiguous"))
    assert [p.key for p in problems if "mtp_num_layers" in p.message] == ["attention.params.token_layout"]


@pytest.mark.parametrize(
    ("params", "key", "text"),
    [
        (["segment_lengths=[64,256]"], "dilation_rates", "2 segment_lengths and 0 dilation_rates"),
        (["segment_lengths=[64,0]", "dilation_rates=[1,2]"], "segment_lengths", "0 is no number of tokens"),
        (["segment_lengths=[64]", "dilation_rates=[1.5]"], "dilation_rates", "1.5 is no number of tokens"),
        (["segment_lengths=64"], "segment_lengths", "list is needed"),
        (["token_layout=striped"], "token_layout", "zigzag, contiguous"),
        (["offset=head"], "offset", "kv_group, query_head, torchscale_block"),
        (["block=3"], "block", "no parameter"),
    ],
)
def test_patterns_that_cannot_be_are_refused(params, key, text):
    problems = check(small_job("attention=ring_dilated", *(f"attention.params.{each}" for each in params)))
    assert [problem.key for problem in problems] == [f"attention.params.{key}"]
    assert text in str(problems[0])
