"""How Megatron saves under megaplug: beside, hashed by whoever writes, named when it is whole."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import RanksFailed
from small_jobs import SmallJobs, curve, state, validations

from megaplug.runs.checkpoints import SAVING, TRACKER, list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import read_manifest, verify_manifest

WORDS = [
    "name=saved", "model.num_layers=2", "topology.dp=2", "train.iters=6", "checkpoint.save_interval=2",
    "checkpoint.async_save=false",
]  # fmt: skip


def steps_of(folder: RunFolder) -> list[int]:
    return [found.iteration for found in list_checkpoints(folder.checkpoints)]


def note_what_is_read() -> None:
    """Every file that is read to be hashed is named in ``read.txt`` beside the ranks' logs."""
    from megaplug.runs import manifest

    real = manifest._sha256

    def sha256(path: Path, **how: Any) -> str:
        with Path(os.environ["NOTED"]).open("a") as file:
            file.write(f"{path.name}\n")
        return real(path, **how)

    manifest._sha256 = sha256


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))
    return tmp_path / "noted"


def plant_noting(path: str) -> None:
    os.environ["NOTED"] = path
    note_what_is_read()


def test_the_writers_hashes_are_those_of_the_files_and_nobody_reads_shards(
    small_jobs: SmallJobs, noted: Path
) -> None:
    folder = small_jobs.run([*WORDS, "train.seed=11"], plant=functools.partial(plant_noting, str(noted)))
    assert steps_of(folder) == [4, 6]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "iter_0000004",
        "iter_0000006",
        TRACKER,
    ]
    assert (folder.checkpoints / TRACKER).read_text() == "6"
    for found in list_checkpoints(folder.checkpoints):
        manifest = read_manifest(found.path)
        assert manifest is not None and manifest["extra"]["iteration"] == found.iteration
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} == set(manifest["files"])
        for name, entry in manifest["files"].items():
            assert entry["sha256"] == hashlib.sha256((found.path / name).read_bytes()).hexdigest()
    assert set(noted.read_text().split()) == {".metadata", "metadata.json"}


def die_while_writing(at_save: int) -> None:
    """SIGKILL to rank 1 in the middle of its shard."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    real = filesystem_async._write_item
    files: set[str] = set()

    @functools.wraps(real)  # Megatron looks at its signature
    def write_item(transforms: Any, stream: Any, data: Any, item: Any, key: str, **more: Any) -> Any:
        files.add(str(stream.name))
        if os.environ["RANK"] == "1" and len(files) == at_save and stream.tell() > 0:
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(transforms, stream, data, item, key, **more)

    filesystem_async._write_item = write_item


@pytest.mark.slow
def test_a_killed_save_leaves_nothing_that_looks_like_a_checkpoint_and_the_run_goes_on(
    small_jobs: SmallJobs,
) -> None:
    undisturbed = curve(small_jobs.run([*WORDS, "train.seed=12", "name=undisturbed"]))
    words = [*WORDS, "train.seed=12", "name=killed"]
    with pytest.raises(RanksFailed):
        small_jobs.run(words, plant=functools.partial(die_while_writing, 2))
    (run,) = (small_jobs.root / "runs").glob("killed-*")
    folder = RunFolder(run)
    assert steps_of(folder) == [2] and (folder.checkpoints / TRACKER).read_text() == "2"
    assert verify_manifest(folder.checkpoints / "iter_0000002") == []
    left = folder.checkpoints / SAVING / "iter_0000004"
    assert (left / "__1_0.distcp").stat().st_size > 0 and not (left / "metadata.json").exists()
    assert small_jobs.run(words) == folder
    assert not (folder.checkpoints / SAVING).exists() and steps_of(folder) == [4, 6]
    assert curve(folder) == undisturbed and state(folder).saved_iteration == 6


def test_megatron_itself_would_take_a_killed_save_for_one(small_jobs: SmallJobs) -> None:
    """What is mended: Megatron's own way leaves ``iter_*`` half written, beside whole ones."""
    words = [*WORDS, "train.seed=13", "name=plain"]
    with pytest.raises(RanksFailed):
        small_jobs.run(words, plant=functools.partial(as_megatron_saves, 2))
    (run,) = (small_jobs.root / "runs").glob("plain-*")
    folder = RunFolder(run)
    assert steps_of(folder) == [2, 4]
    assert not (folder.checkpoints / "iter_0000004" / "metadata.json").exists()


def as_megatron_saves(at_save: int) -> None:
    from megaplug.runtime.saving import Saver

    Saver.watch = lambda self, training: None  # type: ignore[method-assign]
    die_while_writing(at_save)


def test_other_things_that_megatron_writes_to_save_stay_where_they_were(small_jobs: SmallJobs) -> None:
    folder = small_jobs.run([*WORDS, "train.seed=14", "+megatron.log_progress=true"])
    assert "Saved checkpoint" in (folder.checkpoints / "progress.txt").read_text()
    assert steps_of(folder) == [4, 6]


def test_what_is_told_of_a_save(small_jobs: SmallJobs) -> None:
    folder = small_jobs.run([*WORDS, "train.seed=15"])
    found = state(folder)
    assert (found.status, found.saved_iteration) == ("finished", 6)
    manifest = json.loads((folder.checkpoints / "iter_0000006" / "manifest.json").read_text())
    assert set(manifest["extra"]) >= {"iteration", "model", "job"}


@pytest.mark.slow
def test_what_is_kept_is_what_was_asked_for(small_jobs: SmallJobs) -> None:
    """The best is an early one: this learning rate leads away from what was learnt."""
    words = ["name=kept", "model.num_layers=2", "train.iters=8", "checkpoint.save_interval=2", "lr.lr=3"]
    words += ["train.eval_interval=2", "train.eval_iters=1", "lr.lr_warmup_fraction=0.5"]
    words += ["checkpoint.keep=1", "checkpoint.keep_every=6", "checkpoint.keep_best=1"]
    folder = small_jobs.run(words)
    losses = dict(validations(folder))
    best = min(losses, key=lambda step: losses[step])
    assert best in (2, 4), losses
    assert steps_of(folder) == [best, 6, 8]
