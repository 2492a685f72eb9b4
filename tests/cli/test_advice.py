"""Changes that are named after an out-of-memory: legal, smaller, the mildest of each kind first."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import SMALL, write_corpus

from megaplug.commands.advice import advise
from megaplug.commands.cli import parse
from megaplug.commands.failure import changed_command, fraction, place_of
from megaplug.commands.resolved import Resolved, memory_of, resolve
from megaplug.job.checks import check, job_shape, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.launchers.machine import RANK_BASE_BYTES
from megaplug.launchers.verdict import Outcome
from megaplug.runs.folder import RunFolder

WORDS = [
    *(word for word in SMALL if word != "device=cpu"),
    "train.micro_batch_size=8",
    "train.global_batch_size=32",
    "model.seq_length=512",
]

# A step whose memory is mostly weights, gradients and moments.
MOSTLY_STATE = ["train.micro_batch_size=1", "model.seq_length=32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    write_corpus(folder / "corpus")
    return folder


def resolved(place: Path, *words: str) -> Resolved:
    paths = [f"data.path={place / 'corpus'}", f"data.cache_dir={place / 'cache'}", f"runs_dir={place}"]
    return resolve(compose_job([*WORDS, *paths, *words]), on_this_machine=False)


@pytest.mark.parametrize(
    ("device", "topology"), [("cuda", []), ("cuda", ["topology=tp2_pp2"]), ("cpu", ["topology.dp=2"])]
)
@pytest.mark.parametrize("at_most", [0.8, 0.3, 0.0])
def test_every_change_is_legal_and_smaller(
    device: str, topology: list[str], at_most: float, place: Path
) -> None:
    job = resolved(place, f"device={device}", *topology)
    advised = advise(job, at_most)
    assert len(advised) == 3
    assert [one.fits for one in advised] == sorted((one.fits for one in advised), reverse=True)
    world = job.topology.world_size if device == "cpu" else 1
    for one in advised:
        changed = compose_job([*WORDS, f"device={device}", *topology, *one.words.split()])
        assert check(changed, device=device) == []
        grid = resolve_topology(changed)
        needed = memory_of(changed, grid, job_shape(changed, job.derived.vocab_size)).total
        assert needed * (grid.world_size if device == "cpu" else 1) == one.bytes_needed
        assert one.bytes_needed < 0.98 * job.memory.total * world
        assert one.fits == (one.bytes_needed <= at_most * job.memory.total * world)


def test_the_mildest_comes_first_and_a_grid_follows(place: Path) -> None:
    words = [one.words for one in advise(resolved(place, "device=cuda"), 0.8)]
    assert words[0] == "train.micro_batch_size=4"
    assert words[1].startswith("train.recompute_granularity=full")
    assert words[2] == "topology.tp=2"


def test_no_more_ranks_are_asked_for_than_there_are_gpus(place: Path) -> None:
    one = [advice.words for advice in advise(resolved(place, "device=cuda"), 0.0, 10, max_ranks=1)]
    assert not any("topology" in words for words in one)
    assert "optimizer.optimizer_cpu_offload=true" in one
    job = resolved(place, "device=cuda", "topology.dp=4", "topology.zero=0", *MOSTLY_STATE)
    four = [advice.words for advice in advise(job, 0.99, 10, max_ranks=4)]
    assert "topology.zero=1" in four
    assert "topology.tp=2 topology.dp=2" in four
    grids = [
        compose_job([*WORDS, "device=cuda", "topology.dp=4", *MOSTLY_STATE, *words.split()]) for words in four
    ]
    assert {resolve_topology(grid).world_size for grid in grids} == {4}


@pytest.mark.parametrize("world", [["topology.world_size=4"], ["topology.world_size=4", "topology.dp=4"]])
def test_a_world_that_was_given_keeps_its_size(world: list[str], place: Path) -> None:
    job = resolved(place, "device=cuda", *world)
    finer = [one.words for one in advise(job, 0.99, 10, max_ranks=4) if "topology.tp" in one.words]
    assert finer == ["topology.tp=2 topology.dp=2 topology.world_size=null"]


def test_full_recomputation_takes_the_place_of_modules(place: Path) -> None:
    job = resolved(place, "device=cuda", "train.recompute_modules=[layernorm]")
    words = [one.words for one in advise(job, 0.9, 10)]
    assert "train.recompute_granularity=full train.recompute_modules=null" in words


def test_cpu_ranks_share_out_by_torch(place: Path) -> None:
    job = resolved(place, "device=cpu", "topology.dp=2", *MOSTLY_STATE)
    words = [one.words for one in advise(job, 0.0, 10)]
    assert "topology.zero=3 topology.fsdp=torch" in words


def test_how_far_the_need_must_come_down(place: Path) -> None:
    job = resolved(place, "device=cpu")
    base = RANK_BASE_BYTES
    outcome = Outcome("failed", kind="memory", peak_bytes=2 * base, requested_bytes=base)
    assert fraction(job, outcome) == pytest.approx((0.95 * 2 - 1) / 2)
    assert fraction(job, Outcome("failed", kind="killed", peak_bytes=2 * base)) == 0.8
    assert fraction(job, Outcome("failed", kind="memory", requested_bytes=base)) == 0.8


def test_a_rank_is_named_by_its_place(place: Path) -> None:
    job = resolved(place, "device=cpu", "topology=tp2_pp2")
    assert place_of(job, 3) == "3 of 4: pipeline stage 1 of 2, tp 1 of 2"


def test_what_gets_past_a_failure_says_where_it_begins(place: Path) -> None:
    job = resolved(place, "device=cpu", "resilience.rerun_mode=validate_results", "lr.lr=0.01")
    typed = parse(["lr.lr=0.01", "resilience.rerun_mode=validate_results"], "train")
    folder = RunFolder(place / "run")
    nan = changed_command(job, folder, Outcome("failed", 3, 0, kind="nan"), typed)
    assert nan.startswith("train lr.lr=0.005 resilience.rerun_mode=disabled")
    assert nan.endswith("   # half the learning rate; starts again: nothing was saved")
    saved = changed_command(job, folder, Outcome("failed", 3, 2, kind="reproducible"), typed)
    assert f"load={folder.checkpoints / 'iter_0000002'} load_state=all" in saved
    assert saved.endswith("goes on from step 2")
    for kind in ("unexplained", "persistent"):
        assert changed_command(job, folder, Outcome("failed", 3, 2, kind=kind), typed) == (
            "train lr.lr=0.01 resilience.rerun_mode=disabled   # without computing steps again; "
            "goes on from step 2"
        )
    assert changed_command(job, folder, Outcome("failed", 3, 2, kind="error"), typed) == ""
