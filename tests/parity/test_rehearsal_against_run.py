"""A rehearsal counts what a real run on gloo ranks has: parameters, FLOPs and bytes of a step."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest
from counted_step import count_second_step

from megaplug.job.compose import compose_job
from megaplug.job.freeze import read_frozen
from megaplug.plan.rehearsal import rehearse

# How torch calls what the rehearsal names, without coalescing.
OPERATORS = {
    "all_reduce": ("allreduce_",),
    "all_gather": ("_allgather_base_", "allgather_into_tensor_"),
    "reduce_scatter": ("_reduce_scatter_base_", "reduce_scatter_tensor_"),
    "all_to_all": ("alltoall_base_",),
    "send": ("send",),
    "recv": ("recv_",),
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["topology=tp2", "topology.sequence_parallel=true"], marks=pytest.mark.slow),
        pytest.param(["topology=dp2"], marks=pytest.mark.slow),
        pytest.param(
            ["topology=pp2", "model.untie_embeddings_and_output_weights=false"], marks=pytest.mark.slow
        ),
        pytest.param(["topology=pp2_vpp2", "train.recompute_granularity=full"], marks=pytest.mark.slow),
        pytest.param(["topology=single", "model.swiglu=false"], marks=pytest.mark.slow),
    ],
    ids=lambda layout: layout[0],
)
def test_a_rehearsal_counts_what_a_real_step_has(small_jobs, tmp_path, layout):
    words = [*layout, "train.iters=2", "precision=fp32"]
    folder = small_jobs.run(words, plant=partial(count_second_step, tmp_path))
    frozen = read_frozen(folder.job_file)
    job = compose_job([*small_jobs.words(words), f"model.vocab_size={frozen.derived.vocab_size}"])
    ranks = range(frozen.topology.world_size)
    for rank, rehearsed in zip(ranks, rehearse(job, ranks), strict=True):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        assert rehearsed.parameters == real["parameters"]
        assert sum(rehearsed.flops.values()) == real["flops"]
        ours: Counter[str] = Counter()
        for each in rehearsed.traffic:
            ours[each.collective] += each.bytes
        theirs = {
            name: sum(real["bytes"].get(operator, 0) for operator in operators)
            for name, operators in OPERATORS.items()
        }
        assert {name: count for name, count in theirs.items() if count} == dict(ours), rank
