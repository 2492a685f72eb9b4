"""Our verdict on whole jobs against Megatron's; `megatron_verdict` says which functions are asked.

What Megatron lets through in silence and megaplug does not is refused with words that say so: there Megatron
has to accept the job.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from random_jobs import random_job
from ranks import run_ranks

from megaplug.errors import Problem
from megaplug.job.checks import job_batch, job_shape
from megaplug.job.checks_model import model_problems
from megaplug.job.checks_values import value_problems
from megaplug.job.schema import Job
from megaplug.topology import Topology, resolve, violations

WORKERS = 2
# What a sample must have asked for, on our side and on Megatron's.
FAMILIES = (
    *(
        f"ours topology.{key}"
        for key in ("tp", "pp", "vpp", "cp", "ep", "etp", "world_size", "sequence_parallel")
    ),
    *(f"ours model.{key}" for key in ("num_attention_heads", "num_query_groups")),
    *(
        f"ours moe.{key}"
        for key in ("moe_router_topk", "moe_layer_freq", "moe_shared_expert_intermediate_size")
    ),
    "ours topology.decoder_first_pipeline_num_layers",
    "ours topology.decoder_last_pipeline_num_layers",
    "ours train.global_batch_size",
    *(
        f"theirs {step}"
        for step in ("arguments", "configuration", "process groups", "layers", "model", "forward")
    ),
)


def our_verdict(job: Job) -> tuple[Topology | None, list[Problem]]:
    """As `check` asks, without its search for the nearest topologies."""
    problems = value_problems(job)
    topology, found = resolve(job.topology)
    if problems or topology is None:
        return topology, problems + found
    overlap = job.overlap.overlap_p2p_comm is not False
    found += violations(topology, job_shape(job), job_batch(job), overlap_p2p_comm=overlap)
    return topology, found + model_problems(job)


def judge(seed: int, count: int) -> dict[str, Any]:
    """One worker's share: how often which side refused what, and every disagreement."""
    from megaplug.runtime import cpu

    cpu.install()
    from megatron_verdict import refusal

    draw = random.Random(f"{seed} {os.environ['RANK']}")
    tally: Counter[str] = Counter()
    disagreements = []
    while tally["jobs"] < count:
        job = random_job(draw)
        topology, problems = our_verdict(job)
        if topology is None:
            continue
        theirs = refusal(job, topology, job_shape(job).padded_vocab_size(topology.tp))
        tally["jobs"] += 1
        tally["legal"] += not problems and theirs is None
        for key in {problem.key for problem in problems}:
            tally[f"ours {key}"] += 1
        if theirs is not None:
            tally[f"theirs {theirs[0]}"] += 1
        refused = [problem for problem in problems if not problem.megatron_accepts]
        tally["accepted by Megatron alone"] += bool(problems) and not refused
        if bool(refused) != (theirs is not None):
            disagreements.append((job.topology, job.moe, job.model, job.train, problems, theirs))
    return {"tally": tally, "disagreements": disagreements}


def judged(count: int, seed: int, folder: Path, timeout_s: float) -> Counter[str]:
    answers = run_ranks(WORKERS, judge, seed, count // WORKERS, folder=folder, timeout_s=timeout_s)
    disagreements = [found for answer in answers for found in answer["disagreements"]]
    assert not disagreements, f"{len(disagreements)} disagreements, the first: {disagreements[0]}"
    return sum((answer["tally"] for answer in answers), Counter())


def test_our_verdict_on_a_job_is_megatrons(tmp_path: Path) -> None:
    """Four hundred here; `make soak` asks for 10,000 others."""
    tally = judged(400, seed=1, folder=tmp_path, timeout_s=240)
    assert 100 < tally["legal"] < 300, tally


@pytest.mark.soak
def test_our_verdict_on_ten_thousand_jobs_is_megatrons(tmp_path: Path) -> None:
    tally = judged(10_000, seed=2, folder=tmp_path, timeout_s=600)
    print(dict(sorted(tally.items())))
    assert 3_000 < tally["legal"] < 7_000, tally
    missing = [family for family in FAMILIES if tally[family] < 20]
    assert not missing and tally["theirs schedule"], tally
    # The rules that Megatron does not have are met, and are few.
    assert 20 < tally["accepted by Megatron alone"] < 200, tally
