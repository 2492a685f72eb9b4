"""Which checkpoint ``load=`` means, and which it must not take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from job_factory import FOLDER, resolved
from small_checkpoints import COMMON, craft_object, make_checkpoint
from test_freeze import frozen_in

from megaplug.errors import UserError
from megaplug.job.compose import compose_job
from megaplug.job.freeze import write_frozen
from megaplug.job.load import Source, find_source, source_problems
from megaplug.job.translate import megatron_arguments
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import write_manifest


def make_run(path: Path, *words: str, iterations: tuple[int, ...] = (10, 20)) -> RunFolder:
    """A run's folder with checkpoints that hold a file and a manifest, and no tensors."""
    path.mkdir()
    frozen = frozen_in(path, *words)
    write_frozen(frozen)
    for iteration in iterations:
        checkpoint = frozen.folder.checkpoints / f"iter_{iteration:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(b"0123456789")
        write_manifest(
            checkpoint, {"iteration": iteration, "model": frozen.model_fingerprint, "job": frozen.digest}
        )
    return frozen.folder


def source_of(run: RunFolder | Path, state: str = "weights") -> Source:
    path = run.path if isinstance(run, RunFolder) else run
    source = find_source(compose_job([f"load={path}", f"load_state={state}"]))
    assert source is not None
    return source


def problems(source: Source, *words: str) -> str:
    job, topology, derived, facts = resolved(*words)
    return "\n".join(map(str, source_problems(job, source, derived, topology, facts)))


def test_without_load_there_is_no_source() -> None:
    assert find_source(compose_job([])) is None


def test_a_run_means_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert source_of(run).checkpoint.iteration == 20
    assert source_of(run).passed_over == ()
    (run.checkpoints / "iter_0000020" / "weights").write_bytes(b"01234")
    source = source_of(run)
    assert source.checkpoint.iteration == 10
    assert source.passed_over == ("step 20 is not whole: weights has 5 bytes in place of 10",)
    (run.checkpoints / "iter_0000010" / "weights").unlink()
    with pytest.raises(UserError, match=r"none of the 2 .* \(step 20 is not whole: weights has 5") as refused:
        source_of(run)
    assert "continue that run first" in refused.value.hint


def test_copies_that_are_all_damaged_are_no_run_to_continue(tmp_path: Path) -> None:
    (tmp_path / "copies" / "iter_0000010").mkdir(parents=True)
    with pytest.raises(UserError, match="the only checkpoint of ") as refused:
        find_source(compose_job([f"load={tmp_path / 'copies'}"]))
    assert "continue" not in refused.value.hint and "another copy" in refused.value.hint


def test_a_program_in_somebody_s_checkpoint_is_refused_and_does_not_run(tmp_path: Path) -> None:
    checkpoint, marker = make_checkpoint(tmp_path / "theirs", 10), tmp_path / "ran"
    assert source_of(checkpoint).checkpoint.iteration == 10
    craft_object(checkpoint, COMMON, marker)
    with pytest.raises(UserError, match=r"common_state/shard_0_1 would import _io\.open"):
        source_of(checkpoint)
    assert not marker.exists()


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert source_of(run.checkpoints / "iter_0000010").checkpoint.iteration == 10
    (run.checkpoints / "iter_0000010" / "weights").unlink()
    with pytest.raises(UserError, match="not a whole checkpoint"):
        source_of(run.checkpoints / "iter_0000010")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        source_of(tmp_path / "none")
    with pytest.raises(UserError, match="has no checkpoint"):
        source_of(make_run(tmp_path / "run", iterations=()))
    with pytest.raises(UserError, match="neither a run nor a checkpoint"):
        source_of(tmp_path)


def test_the_same_model_loads_under_another_topology_and_precision(tmp_path: Path) -> None:
    source = source_of(make_run(tmp_path / "run"))
    assert problems(source, "topology=tp2_pp2", "precision=bf16", "lr=constant", "train.iters=5") == ""


def test_another_model_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    text = problems(source_of(make_run(tmp_path / "run")), "model.num_layers=8", "model.rotary_base=500000")
    assert "model.num_layers is 4 there and 8 here" in text
    assert "model.rotary_base is 10000 there and 500000 here" in text


def test_a_checkpoint_on_its_own_is_known_by_its_manifest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    alone = tmp_path / "alone"
    alone.mkdir()
    (run.checkpoints / "iter_0000010").rename(alone / "iter_0000010")
    source = source_of(alone / "iter_0000010")
    assert source.frozen is None
    assert problems(source) == ""
    assert "model.num_layers" in problems(source, "model.num_layers=8")


def test_a_checkpoint_of_nobody_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000010"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"0")
    write_manifest(checkpoint)
    assert "does not say which model" in problems(source_of(checkpoint))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.iters=40", "precision=bf16"], "precision.bf16 is False there and True here"),
        (["train.iters=20"], "step 20"),
    ],
)
def test_the_whole_state_is_refused_where_it_cannot_go_on(
    tmp_path: Path, words: list[str], says: str
) -> None:
    source = source_of(make_run(tmp_path / "run"), "all")
    assert problems(source, "train.iters=40", "topology=dp2") == ""
    assert says in problems(source, *words)


@pytest.mark.parametrize(
    ("there", "here", "fine"), [(1, 2, False), (2, 1, False), (2, 4, True), (1, 1, True)]
)
def test_experts_can_be_spread_differently_but_not_gathered(
    tmp_path: Path, there: int, here: int, fine: bool
) -> None:
    source = source_of(make_run(tmp_path / "run", "moe=small", f"topology.ep={there}"), "all")
    text = problems(source, "moe=small", f"topology.ep={here}", "train.iters=40")
    assert (text == "") == fine
    weights = dataclasses.replace(source, weights_only=True)
    assert problems(weights, "moe=small", f"topology.ep={here}") == ""


def test_staging_holds_that_checkpoint_alone_and_a_tracker(tmp_path: Path) -> None:
    run, new = make_run(tmp_path / "run"), RunFolder(tmp_path / "new")
    source_of(run).stage(new)
    staging = source_of(run.checkpoints / "iter_0000010").stage(new)
    assert sorted(entry.name for entry in staging.iterdir()) == [
        "iter_0000010",
        "latest_checkpointed_iteration.txt",
    ]
    assert (staging / "latest_checkpointed_iteration.txt").read_text().strip() == "10"
    assert (staging / "iter_0000010" / "weights").read_bytes() == b"0123456789"


def test_megatron_is_told_what_to_take_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    job, topology, derived, facts = resolved()
    weights = megatron_arguments(job, topology, derived, facts, FOLDER, source=source_of(run))
    whole = megatron_arguments(job, topology, derived, facts, FOLDER, source=source_of(run, "all"))
    again = megatron_arguments(job, topology, derived, facts, FOLDER, source=source_of(run), resuming=True)
    staging = str(FOLDER.path / "load")
    assert weights[weights.index("--load") + 1] == whole[whole.index("--load") + 1] == staging
    assert {"--finetune", "--no-load-optim", "--no-load-rng"} <= set(weights)
    assert "--finetune" not in whole and "--override-opt_param-scheduler" in whole
    assert again[again.index("--load") + 1] == str(FOLDER.checkpoints)
    assert "--finetune" not in again


def test_a_disk_that_does_not_take_the_name_of_a_checkpoint_is_one_message(tmp_path: Path) -> None:
    source = source_of(make_run(tmp_path / "run"))
    folder = RunFolder(tmp_path / "other")
    folder.path.mkdir()
    source.staging(folder).touch()
    with pytest.raises(UserError, match="cannot name the checkpoint in"):
        source.stage(folder)
