"""Overlap is on wherever Megatron allows it, and what is off says why."""

from __future__ import annotations

import sys

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job.checks import check
from megaplug.job.overlap import ON, overlap_line
from megaplug.job.translate import megatron_arguments

GRADIENTS, PARAMETERS, PIPELINE, TENSOR = (
    "overlap_grad_reduce", "overlap_param_gather", "overlap_p2p_comm", "tp_comm_overlap",
)  # fmt: skip


def decided(*words: str, device: str = "cuda") -> dict[str, str]:
    return resolved(*words, device=device)[2].overlap


@pytest.mark.parametrize(
    ("words", "on"),
    [
        ("", set()),
        ("topology=dp2", {GRADIENTS, PARAMETERS}),
        ("topology=tp2_pp2", set()),
        ("topology=pp2_vpp2", {PIPELINE}),
        ("topology=pp2_vpp2 topology.dp=2", {GRADIENTS, PARAMETERS, PIPELINE}),
        ("topology=tp2_sp backend=te precision=bf16", {TENSOR}),
        ("topology=tp2_sp backend=te", set()),
        ("topology=tp2_sp backend=native precision=bf16", set()),
        ("topology=tp2_sp backend=te precision=bf16 train.deterministic_mode=true", set()),
        ("topology.tp=2 topology.sequence_parallel=false backend=te precision=bf16", set()),
        ("topology=dp2 overlap=off", set()),
        ("topology=dp2 overlap.overlap_param_gather=false", {GRADIENTS}),
        ("topology=dp2 overlap.overlap_grad_reduce=false", set()),
        # Two ranks share no data, but hold the same experts.
        ("moe=small topology.tp=2 topology.ep=1 topology.etp=1 topology.dp=1", {GRADIENTS, PARAMETERS}),
    ],
)
def test_it_is_on_wherever_megatron_allows_it(words, on):
    found = decided(*words.split())
    assert {name for name, word in found.items() if word == ON} == on
    assert all(found.values())


def test_megatron_reads_it_and_takes_it(monkeypatch):
    from megatron.training.arguments import parse_args

    words = megatron_arguments(*resolved("topology=pp2_vpp2", "topology.dp=2"), FOLDER)
    monkeypatch.setattr(sys, "argv", ["megaplug", *words])
    args = parse_args()
    assert (args.overlap_grad_reduce, args.overlap_param_gather, args.overlap_p2p_comm) == (True, True, True)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("overlap.overlap_grad_reduce=true", "there is one data-parallel rank"),
        ("overlap.overlap_param_gather=true", "there is one data-parallel rank"),
        ("overlap.overlap_p2p_comm=true", "there is one pipeline stage"),
        ("overlap.tp_comm_overlap=true", "tp is 1"),
        ("megatron.overlap_grad_reduce=true", "is set by overlap.overlap_grad_reduce"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_is_refused(word, says):
    assert says in "\n".join(map(str, check(small_job(word), device="cuda")))


def test_the_line_names_what_is_on_and_what_one_could_change():
    assert overlap_line(decided("topology=pp2", "topology.dp=2")) == (
        "gradient reduction, parameter gathering; "
        "pipeline transfers off: it needs virtual stages (topology.vpp)"
    )
    assert overlap_line(decided()) == ""
