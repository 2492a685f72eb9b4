"""What is wrong with a job that is to be shared out among several nodes."""

from __future__ import annotations

import pytest
from job_factory import small_job

from megaplug.errors import Problem
from megaplug.job.checks import check

NODES = ["launch=nodes", "launch.nnodes=2", "launch.node_rank=0", "launch.master_addr=10.0.0.1"]


def _launch_problems(*words: str) -> list[Problem]:
    return [problem for problem in check(small_job(*words)) if problem.key.startswith("launch.")]


@pytest.mark.parametrize(
    "words",
    [
        ["topology.dp=2"],
        ["topology.pp=2", "launch.node_rank=1"],
        ["topology.tp=2", "topology.dp=2"],
        ["topology.tp=2", "topology.pp=2", "launch.master_port=1"],
        ["topology.tp=2", "launch.nnodes=1"],
        ["topology.tp=2", "launch.nnodes=1", "launch.master_port=null"],
        ["topology.cp=2", "attention=ring", "topology.dp=2"],
        # What reaches beyond a node is slow, and can be wished for.
        ["topology.tp=2", "launch.within_node=[]"],
        ["topology.tp=2", "launch.within_node=[cp]"],
        ["topology.tp=4", "topology.dp=2", "launch.nnodes=4", "launch.within_node=[]", "lr=constant"],
    ],
)
def test_a_job_that_can_be_shared_out_has_no_problem(words: list[str]) -> None:
    assert check(small_job(*NODES, *words)) == []


def test_what_every_node_must_be_told_is_asked_for_at_once() -> None:
    assert [str(problem) for problem in _launch_problems("launch=nodes", "topology.dp=2")] == [
        "launch.nnodes: is not given: how many nodes there are",
        "launch.node_rank: is not given: which of them this is, from 0",
        "launch.master_addr: is not given: the address of node 0",
    ]


@pytest.mark.parametrize(
    ("words", "key", "message", "hint"),
    [
        (["launch.node_rank=2"], "node_rank", "is 2, and there are 2 nodes", "from 0 to 1"),
        (["launch.node_rank=-1"], "node_rank", "is -1, and there are 2 nodes", "from 0 to 1"),
        (["launch.nnodes=1", "launch.node_rank=1"], "node_rank", "is 1, and there is 1 node", "use 0"),
        (["launch.nnodes=0"], "nnodes", "must be above 0, but is 0", ""),
        (["launch.nnodes=-2"], "nnodes", "must be above 0, but is -2", ""),
        (["launch.join_s=0"], "join_s", "must be above 0", ""),
        (["launch.master_addr="], "master_addr", "is not given: the address of node 0", ""),
        (
            ["launch.master_port=null"],
            "master_port",
            "the other nodes cannot know a port that is found",
            "such as 29400",
        ),
        (["launch.master_port=70000"], "master_port", "must be between 1 and 65535, but is 70000", ""),
        (["launch.within_node=[tp,pq]"], "within_node", "pq is no process group", "groups: tp, cp, dp"),
        (["topology.world_size=1"], "nnodes", "1 rank cannot be shared out among 2 nodes", "a multiple"),
        (
            ["topology.dp=4", "launch.nnodes=3"],
            "nnodes",
            "4 ranks cannot be shared out among 3",
            "a multiple",
        ),
        (
            ["topology.tp=2", "topology.dp=1"],
            "nnodes",
            "groups of 2 ranks (tp) would reach beyond a node of 1",
            "use fewer nodes, or a smaller tp; launch.within_node=[cp] allows it",
        ),
        (
            ["topology.cp=2", "attention=ring", "topology.dp=1"],
            "nnodes",
            "groups of 2 ranks (cp) would reach beyond a node of 1",
            "launch.within_node=[tp] allows it",
        ),
        (
            ["topology.dp=2", "launch.within_node=[dp]"],
            "nnodes",
            "groups of 2 ranks (dp) would reach beyond a node of 1",
            "launch.within_node=[] allows it",
        ),
    ],
)
def test_what_cannot_be_is_one_problem_with_what_would_be_right(
    words: list[str], key: str, message: str, hint: str
) -> None:
    grid = [] if any(word.startswith("topology.") for word in words) else ["topology.dp=2"]
    (problem,) = _launch_problems(*NODES, *grid, *words)
    assert problem.key == f"launch.{key}"
    assert message in problem.message and hint in problem.hint


def test_every_group_that_would_be_cut_is_told() -> None:
    words = ["topology.tp=2", "topology.cp=2", "attention=ring", "launch.nnodes=4"]
    assert [problem.message for problem in _launch_problems(*NODES, *words)] == [
        "groups of 2 ranks (tp) would reach beyond a node of 1",
        "groups of 2 ranks (cp) would reach beyond a node of 1",
    ]


@pytest.mark.parametrize("launch", ["print", "freeze"])
def test_what_is_only_shown_or_written_may_be_for_several_nodes(launch: str) -> None:
    assert _launch_problems(*NODES, "topology.dp=2", f"launch={launch}") == []


@pytest.mark.parametrize("key", ["nnodes", "node_rank"])
def test_on_one_machine_no_node_has_a_number(key: str) -> None:
    (problem,) = _launch_problems("launch=local", f"launch.{key}=1", "topology.dp=2")
    assert problem == Problem(f"launch.{key}", "means nothing on this machine alone", "use launch=nodes")
