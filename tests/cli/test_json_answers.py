"""``output=json``: whatever the answer is, stdout is one JSON document, stderr is empty, the code as ever."""

from __future__ import annotations

import json

import pytest

from megaplug.commands import plan
from megaplug.errors import Problem, UserError

LLAMA = ("model=llama3_8b", "cluster=h100", "precision=bf16")


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (["tokens=abc"], "", "tokens=abc is not a whole number above 0"),
        (["modl=tiny"], "modl", "there is no such key or group"),
        (["model=tny"], "model", "there is no option 'tny'"),
        (["action=plane"], "", "action=plane does not exist"),
        (["action=search", "model=tiny", "ranks=0"], "", "ranks=... means nothing to action=search"),
        (["topology.pp=3"], "topology.pp", "4 layers cannot be dealt out evenly to 3 stages"),
        (["train.seed=-1"], "train.seed", "must not be negative"),
        (["action=rehearse", "topology.pp=3"], "topology.pp", "4 layers cannot be dealt out evenly"),
        (["action=search", *LLAMA, "topology.world_size=67"], "", "no topology of 67 ranks is legal"),
        (["action=search", *LLAMA, "topology.world_size=0"], "topology.world_size", "must be at least 1"),
        (["action=search", *LLAMA], "", "topology.world_size is not given"),
        (["action=doctor", "model=tny"], "model", "there is no option 'tny'"),
        (["--nonsense"], "", "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_a_document_too(words, key, said, capsys):
    assert plan.main([*words, "output=json"]) == 2
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert shown.err == ""
    assert answer["possible"] is False
    (problem,) = answer["problems"]
    assert problem["key"] == key
    assert said in problem["message"]
    # the same for a person
    assert plan.main(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "{" not in shown.out


def test_several_mistakes_are_several_problems(capsys):
    words = ["action=search", *LLAMA, "topology.world_size=8", "topology.tp=0", "topology.pp=0"]
    assert plan.main([*words, "output=json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem["key"] for problem in problems] == ["topology.tp", "topology.pp"]


def test_an_error_keeps_the_problems_that_it_lists():
    one, other = Problem("topology.tp", "too large", "smaller"), Problem("", "too late")
    assert UserError.from_problems([one, other]).problems == (one, other)
    assert UserError.from_problems([one]).problems == (one,)
    assert UserError("no", hint="yes").problems == (Problem("", "no", "yes"),)
