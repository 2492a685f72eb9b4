"""What a refused plan proposes is typed as it stands: each proposal makes a plan that is legal and fits."""

from __future__ import annotations

import json
import re

import pytest

from megaplug.commands import plan, plan_job
from megaplug.commands.hints import overrides_in

BF16 = ("cluster=h100", "precision=bf16")
IMPOSSIBLE = {
    "70B in one node": ("model=llama3_70b", "topology=tp8", *BF16),
    "405B in 8 stages": ("model=llama3_405b", "topology=tp8_pp8", *BF16),
    "8B in fp32": ("model=llama3_8b", "cluster=h100"),
    "8B on a 4090": ("model=llama3_8b", "cluster=rtx4090", "precision=bf16"),
    "three heads": ("model=llama3_8b", "topology.tp=3", *BF16),
    "five stages": ("model=llama3_8b", "topology.tp=2", "topology.pp=5", *BF16),
    "a batch for other replicas": ("model=llama3_8b", "topology.tp=8", "topology.dp=3", *BF16),
    "a batch of 400B": ("model=arbor_400b", "topology.world_size=32", "model.seq_length=8192", *BF16),
    "fewer GPUs than TP": ("model=llama3_8b", "topology=tp8", "cluster.num_gpus=4", *BF16),
    "fewer GPUs than ranks": (
        "model=llama3_8b",
        "topology.tp=4",
        "topology.dp=6",
        "cluster.num_gpus=18",
        *BF16,
    ),
    "one GPU": ("model=llama3_70b", "topology=tp8", "cluster.num_gpus=1", *BF16),
    "FP8 on A100": ("model=llama3_8b", "topology=tp8", "precision=fp8", "cluster=a100_80gb"),
    "FP8 on A100 without TE": (
        *("model=llama3_8b", "topology=tp8", "precision=fp8", "cluster=a100_80gb", "backend=native"),
    ),
    "FP8 without TE": ("model=llama3_8b", "topology=tp8", "precision=fp8", "cluster=h100", "backend=native"),
    "three expert groups": ("model=mixtral_8x7b", "topology.ep=3", "topology.dp=4", *BF16),
    "experts of a dense model": ("model=llama3_8b", "topology=tp4", "topology.ep=2", *BF16),
    "too many experts a token": (
        *(
            "model=mixtral_8x7b",
            "topology=tp8_pp4",
            "moe.moe_router_topk=9",
            "train.micro_batch_size=1",
            *BF16,
        ),
    ),
    "an even world": ("model=llama3_8b", "topology.tp=4", "topology.world_size=6", *BF16),
    "a product that is another": (
        *("model=llama3_8b", "topology.tp=4", "topology.dp=2", "topology.world_size=16", *BF16),
    ),
    "two million tokens": ("model=arbor_200b", "topology.tp=4", "topology.pp=8", "train=pretrain", *BF16),
    "DeepSeek-V3 in 16 stages": (
        *("model=deepseek_v3", "topology.pp=16", "topology.ep=64", "topology.world_size=1024", *BF16),
        "train=pretrain",
    ),
    "virtual stages": ("model=llama3_8b", "topology.pp=4", "topology.tp=2", "topology.vpp=3", *BF16),
    "context of flash": ("model=llama3_8b", "topology.tp=8", "topology.cp=2", *BF16),
    "sequences that CP does not cut": (
        *("model=llama3_8b", "topology.tp=8", "topology.cp=3", "attention=te", *BF16),
    ),
}


def proposed(words, capsys):
    """The overrides of every hint and remedy of a refused plan, those of one proposal together."""
    assert plan.main([*words, "output=json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["problems"]
    hinted = [found for problem in said["problems"] for found in overrides_in(problem["hint"])]
    return [*(remedy["overrides"] for remedy in said["nearest_that_work"]), *hinted], said


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_every_proposal_leads_to_a_plan_that_fits(name, capsys):
    words = IMPOSSIBLE[name]
    proposals = proposed(words, capsys)[0]
    assert proposals or name == "one GPU", "nothing is proposed"
    for added in proposals:
        assert plan.main([*words, *added, "output=json"]) == 0, added
        said = json.loads(capsys.readouterr().out)
        assert said["possible"] and said["memory"]["fits"], added


def test_what_is_printed_for_a_person_is_what_a_program_gets(capsys):
    words = IMPOSSIBLE["405B in 8 stages"]
    _, said = proposed(words, capsys)
    assert plan.main(list(words)) == 2
    text = capsys.readouterr().err
    lines = re.findall(r"^    (\S+=.*?)   #", text, re.MULTILINE)
    assert lines == [" ".join(remedy["overrides"]) for remedy in said["nearest_that_work"]]


@pytest.mark.parametrize("name", ["405B in 8 stages", "8B on a 4090", "fewer GPUs than TP"])
def test_the_cheapest_remedy_comes_first_and_names_its_price(name, capsys):
    _, said = proposed((*IMPOSSIBLE[name], "cluster.price_per_gpu_hour=2"), capsys)
    prices = [one["us_dollars_per_billion_tokens_modelled"] for one in said["nearest_that_work"]]
    assert prices == sorted(prices) and min(prices) > 0


def test_a_remedy_that_trains_otherwise_says_so(capsys):
    words = IMPOSSIBLE["two million tokens"]
    _, said = proposed(words, capsys)
    assert {word.partition("=")[0] for word in said["nearest_that_work"][0]["overrides"]} >= {
        "model.seq_length"
    }
    assert plan.main(list(words)) == 2
    assert re.search(
        r"trains otherwise: sequences of \d[\d,]* tokens, not 2,097,152", capsys.readouterr().err
    )


def test_of_what_no_layout_makes_right_none_is_looked_for(monkeypatch, capsys):
    monkeypatch.setattr(plan_job, "nearest_jobs", lambda *_: pytest.fail("looked for other layouts"))
    assert plan.main(["model=tiny", "attention=ring", "megatron.softmax_type=learnable"]) == 2
    assert "no attention sinks" in capsys.readouterr().err
