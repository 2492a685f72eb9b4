"""Which dense checkpoints can become which experts, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_factory import FOLDER, resolved
from test_load import make_run, source_of

from megaplug.job.load import source_problems
from megaplug.job.translate import megatron_arguments

# Of a model whose MLP is 688 wide.
EXPERTS = ("moe=small", "moe.num_experts=8", "moe.moe_router_topk=2", "moe.moe_ffn_hidden_size=null")
UPCYCLE = "load_state=upcycle"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_run(tmp_path / "dense").path


def problems(there: Path, *words: str) -> list[str]:
    words = (f"load={there}", UPCYCLE, *words)
    job, topology, derived, facts = resolved(*words)
    return [str(each) for each in source_problems(job, source_of(there, "upcycle"), derived, topology, facts)]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("moe.moe_ffn_hidden_size=344",),
        ("moe.moe_ffn_hidden_size=172", "moe.moe_router_topk=4"),
        ("moe.layers=[2,4]",),
        ("moe.experts=sequential",),
        ("topology.tp=2", "topology.ep=2", "topology.etp=1", "topology.sequence_parallel=true"),
        ("topology.zero=0",),
    ],
)
def test_a_dense_model_becomes_experts_of_its_width_or_of_parts_of_it(words, dense) -> None:
    assert problems(dense, *EXPERTS, *words) == []


@pytest.mark.parametrize(
    ("words", "key", "says", "hint"),
    [
        (("moe.moe_ffn_hidden_size=300",), "moe.moe_ffn_hidden_size", "688 wide", "use 344"),
        (("moe.moe_ffn_hidden_size=172", "moe.num_experts=6"), "moe.num_experts", "4 parts", "use 8"),
        (("moe.moe_ffn_hidden_size=172",), "moe.moe_router_topk", "4 experts together", "use 4"),
        (
            ("moe.moe_shared_expert_intermediate_size=688",),
            "moe.moe_shared_expert_intermediate_size",
            "added to it",
            "leave it out",
        ),
        (
            ("moe.moe_router_topk_scaling_factor=2.5",),
            "moe.moe_router_topk_scaling_factor",
            "a multiple",
            "leave it out",
        ),
        (
            ("moe.moe_router_load_balancing_type=sinkhorn", "moe.moe_aux_loss_coeff=0"),
            "moe.moe_router_load_balancing_type",
            "less than 1 in all",
            "aux_loss",
        ),
        (
            ("moe.moe_router_score_function=sigmoid", "moe.moe_router_topk=1"),
            "moe.moe_router_score_function",
            "less than 1",
            "softmax",
        ),
        (("model.num_layers=8",), "load", "model.num_layers is 4 there and 8 here", "as it is there"),
        (("model.ffn_hidden_size=344",), "load", "model.ffn_hidden_size is 688 there and 344", "as it is"),
    ],
)
def test_what_cannot_be_is_named_with_what_can(words, key, says, hint, dense) -> None:
    (found,) = problems(dense, *EXPERTS, *words)
    assert found.startswith(f"{key}: ") and says in found and hint in found


def test_sharded_weights_are_not_made_experts_of(dense) -> None:
    job, topology, derived, facts = resolved(f"load={dense}", UPCYCLE, *EXPERTS)
    job.topology.zero = 3
    (found,) = source_problems(job, source_of(dense, "upcycle"), derived, topology, facts)
    assert "use topology.zero=1 to begin with" in str(found)


def test_upcycling_needs_a_model_with_experts_and_a_checkpoint_without(tmp_path: Path, dense) -> None:
    assert "this model has none" in "".join(problems(dense))
    mixture = make_run(tmp_path / "mixture", "moe=small").path
    assert "has experts already: 4 in a layer" in "".join(problems(mixture, *EXPERTS))


def test_who_loads_a_dense_model_as_a_mixture_is_told_of_upcycling(dense) -> None:
    job, topology, derived, facts = resolved(f"load={dense}", *EXPERTS)
    found = source_problems(job, source_of(dense), derived, topology, facts)
    assert found[-1].hint == "load_state=upcycle makes experts of a dense model"


def test_a_rank_is_told_to_upcycle_until_the_run_has_a_checkpoint_of_its_own(dense) -> None:
    job, topology, derived, facts = resolved(f"load={dense}", UPCYCLE, *EXPERTS)
    source = source_of(dense, "upcycle")
    first = megatron_arguments(job, topology, derived, facts, FOLDER, source=source)
    again = megatron_arguments(job, topology, derived, facts, FOLDER, source=source, resuming=True)
    assert {"--moe-use-upcycling", "--finetune", "--no-load-optim", "--no-load-rng"} <= set(first)
    assert "--moe-use-upcycling" not in again
