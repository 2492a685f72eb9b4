"""What is not wrong and still worth a line: words that do nothing, defaults that surprise."""

from __future__ import annotations

import json

import pytest

from megaplug.commands import plan
from megaplug.commands.notes import repeated

PRETRAIN = ["cluster=h100", "precision=bf16", "train=pretrain", "topology.tp=8"]
DENSE = ["model=llama3_8b", *PRETRAIN]


def noted(words, capsys):
    plan.main([*words, "output=json"])
    return json.loads(capsys.readouterr().out)["notes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*DENSE, "topology.etp=2"], "topology.etp does nothing: llama3_8b has no experts"),
        ([*DENSE, "moe.moe_router_topk=4"], "moe.moe_router_topk does nothing"),
        (
            [*DENSE, "topology.etp=2", "moe.moe_router_topk=4"],
            "topology.etp, moe.moe_router_topk do nothing",
        ),
        ([*DENSE, "moe=deepseek_v3", "moe.num_experts=0"], " more do nothing: llama3_8b has no experts"),
        ([*DENSE, "topology.tp=4"], "topology.tp is given 2 times (8, 4): the last holds, topology.tp=4"),
        ([*DENSE, "tokens=1T", "tokens=2T"], "the last holds, tokens=2T"),
        (["model=llama3_8b", "cluster=h100", "topology.tp=8"], "precision=bf16"),
        (["model=llama3_8b", "cluster=h100", "topology.tp=8"], "train=pretrain has 1,024"),
        (["model=mixtral_8x22b", *PRETRAIN], "sequences of 65,536 tokens"),
        ([*DENSE, "cluster=h200"], "no step time was measured on h200 in bf16"),
    ],
)
def test_a_note_says_what_a_person_may_not_have_meant(words, said, capsys):
    assert any(said in note for note in noted(words, capsys))


@pytest.mark.parametrize(
    "words",
    [
        DENSE,
        [*DENSE, "topology.etp=8", "moe.moe_router_topk=2"],
        [*DENSE, "tokens=1T", "tokens=1T"],
        ["model=moe_30b", *PRETRAIN, "topology.etp=2", "moe.moe_router_topk=4", "model.vocab_size=32000"],
        ["model=mixtral_8x22b", *PRETRAIN, "model.seq_length=65536"],
        ["model=tiny", "cluster=cpu2"],
    ],
)
def test_nothing_is_noted_of_a_job_that_means_what_it_says(words, capsys):
    assert noted(words, capsys) == []


def test_notes_stand_on_the_screen_and_with_a_refusal(capsys):
    plan.main([*DENSE, "topology.etp=2"])
    assert "\nnote           topology.etp does nothing" in capsys.readouterr().out
    plan.main([*DENSE, "topology.etp=2", "topology.pp=5"])
    assert "\n  note: topology.etp does nothing" in capsys.readouterr().err


def test_a_remedy_that_replaces_a_word_is_no_riddle():
    assert repeated(["topology.tp=8", "a", "+topology.tp=4"]) == [
        "topology.tp is given 2 times (8, 4): the last holds, topology.tp=4"
    ]
