"""Patterns that are possible and that a person may not have meant are noted: of two key-value groups here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
from job_factory import small_job

from megaplug.job.idle import idle_notes
from megaplug.job.schema import AttentionConfig, Job

BASE = functools.cache(small_job)  # 256 tokens, 8 heads of 2 groups
ZEROS = "has no 1: {} of the heads' rows are in no branch, and give zeros"
NEAR = "no layer reads further back than {} of the 256 tokens: no segment is as long as model.seq_length"


def job_of(lengths: list[int], rates: list[int], name: str = "dilated", **keys: Any) -> Job:
    params = {"segment_lengths": lengths, "dilation_rates": rates}
    params |= {"offset": keys.pop("offset")} if "offset" in keys else {}
    return dataclasses.replace(BASE(), attention=AttentionConfig(name, params, **keys))


@pytest.mark.parametrize(
    ("lengths", "rates", "offset", "said"),
    [
        ([64, 256], [2, 4], "kv_group", [ZEROS.format("50%")]),
        ([256], [4], "kv_group", [ZEROS.format("75%")]),
        # Rows 0, 4, 8, ... and 1, 5, 9, ... of the shorter, 0 and 1 modulo 3 of the longer.
        ([128, 256], [4, 3], "kv_group", [ZEROS.format("50%")]),
        ([64], [1], "kv_group", [NEAR.format(64)]),
        ([64, 128], [1, 2], "kv_group", [NEAR.format(128)]),
        ([256, 8], [1, 16], "kv_group", ["of each segment of 8 tokens rate 16 takes one row at most"]),
        ([1000, 8], [1, 8], "kv_group", ["of each segment of 8 tokens rate 8 takes one row at most"]),
        ([], [], "kv_group", []),
        ([64, 256], [1, 4], "kv_group", []),
        ([512], [1], "query_head", []),
    ],
)
def test_rows_in_no_branch_and_short_segments_are_noted(lengths, rates, offset, said):
    notes = idle_notes(job_of(lengths, rates, offset=offset))
    assert len(notes) == len(said), notes
    for note, text in zip(notes, said, strict=True):
        assert text in note


@pytest.mark.parametrize("branches", [((3, 2), (256, 2)), ((5, 3), (7, 2)), ((255, 2), (256, 2))])
def test_rows_in_no_branch_are_as_many_as_when_each_is_asked(branches):
    """Of segments that do not fit into each other; heads 0 to 3 have offset 0, and 4 to 7 offset 1."""
    left = [
        all(token % length % rate != offset for length, rate in branches)
        for offset in (0, 1)
        for token in range(256)
    ]
    lengths, rates = zip(*branches, strict=True)
    note = idle_notes(job_of(list(lengths), list(rates)))[0]
    assert ZEROS.format(f"{sum(left) / len(left):.0%}") in note


def test_a_dense_layer_in_the_pattern_reads_the_whole_sequence():
    assert NEAR.format(64) in idle_notes(job_of([64], [1]))[0]
    assert idle_notes(job_of([64], [1], pattern=["ring", "dilated"])) == []
    of_other = {"dilated": {"segment_lengths": [256], "dilation_rates": [2]}}
    (note,) = idle_notes(
        dataclasses.replace(
            BASE(), attention=AttentionConfig("ring", pattern=["ring", "dilated"], pattern_params=of_other)
        )
    )
    assert note.startswith("attention.pattern_params.dilated.dilation_rates has no 1: 50%")


def test_of_a_pattern_that_is_refused_nothing_else_is_said():
    assert idle_notes(job_of([64, 128], [2])) == []
    assert idle_notes(job_of([64], ["x"])) == []  # type: ignore[list-item]
