"""A damaged checkpoint is found, named and set aside, and the one before is used; a stock load takes some."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import RanksFailed
from small_checkpoints import COMMON, craft_common, craft_metadata, craft_object
from small_jobs import SmallJobs, curve, state

from megaplug.runs import checkpoints
from megaplug.runs.checkpoints import TRACKER, list_checkpoints, repair
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import MANIFEST, write_manifest

WORDS = ["name=damaged", "model.num_layers=2", "topology.dp=2", "train.iters=8", "checkpoint.save_interval=2"]
FLIPS = 200


@pytest.fixture(scope="module")
def stopped(small_jobs: SmallJobs) -> RunFolder:
    """A run of two ranks that was stopped at step 6; the checkpoints of steps 4 and 6 are kept."""
    folder = small_jobs.run([*WORDS, "train.stop_at=6"])
    assert [found.iteration for found in list_checkpoints(folder.checkpoints)] == [4, 6]
    return folder


@pytest.fixture
def directory(stopped: RunFolder, tmp_path: Path) -> Path:
    """Its checkpoints, to be damaged."""
    return Path(shutil.copytree(stopped.checkpoints, tmp_path / "checkpoints"))


@pytest.mark.slow
def test_two_hundred_flipped_bytes_are_each_found_named_and_survived(directory: Path) -> None:
    chance = random.Random(5)
    newest = directory / "iter_0000006"
    sizes = {path.name: path.stat().st_size for path in sorted(newest.iterdir())}
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json", MANIFEST} == set(sizes)
    hit = dict.fromkeys(sizes, 0)
    for number in range(FLIPS):
        # Half of them anywhere in the bytes, half in any file: most bytes are those of shards.
        weights = list(sizes.values()) if number % 2 else None
        (name,) = chance.choices(list(sizes), weights)
        place, mask = chance.randrange(sizes[name]), chance.randrange(1, 256)
        flip(newest / name, place, mask)
        report = repair(directory)
        where = f"flip {number}: byte {place} of {name}, by {mask}"
        assert report.newest is not None and report.newest.iteration == 4, where
        (aside,) = report.set_aside
        assert aside.iteration == 6 and [name in fault for fault in aside.faults] == [True], where
        assert (directory / TRACKER).read_text() == "4", where
        aside.path.rename(newest)
        flip(newest / name, place, mask)
        hit[name] += 1
    assert all(hit.values())
    assert repair(directory).newest == checkpoints.Checkpoint(newest, 6)


def flip(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ mask]))


def swap_shards(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").rename(checkpoint / "spare")
    (checkpoint / "__1_0.distcp").rename(checkpoint / "__0_0.distcp")
    (checkpoint / "spare").rename(checkpoint / "__1_0.distcp")


def swap_shards_of_one_size(checkpoint: Path) -> None:
    """The larger is cut to the size of the smaller, in its manifest, too; then they change places."""
    shards = [checkpoint / "__0_0.distcp", checkpoint / "__1_0.distcp"]
    size = min(path.stat().st_size for path in shards)
    for path in shards:
        os.truncate(path, size)
    extra = json.loads((checkpoint / MANIFEST).read_text())["extra"]
    write_manifest(checkpoint, extra)
    swap_shards(checkpoint)


def edit_manifest(checkpoint: Path) -> None:
    """As an editor would: another step, the rest as it was."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    content["extra"]["iteration"] = 7
    (checkpoint / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def nothing_left(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path / "__1_0.distcp", 1000), "__1_0.distcp has 1000 bytes in"),
    "emptied": (lambda path: os.truncate(path / ".metadata", 0), ".metadata has 0 bytes in place of"),
    "swapped": (swap_shards, "__0_0.distcp has"),
    "same size": (swap_shards_of_one_size, "__0_0.distcp has other bytes"),
    "shard missing": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "metadata missing": (lambda path: (path / "metadata.json").unlink(), "metadata.json is missing"),
    "manifest missing": (lambda path: (path / MANIFEST).unlink(), "no manifest"),
    "stranger": (lambda path: (path / "__2_0.distcp").touch(), "__2_0.distcp is not in the manifest"),
    "edited": (edit_manifest, "manifest.json was changed"),
    "nothing left": (nothing_left, "no manifest"),
    "metadata": (lambda path: craft_metadata(path, path.parent / "ran"), ".metadata would import _io.open"),
    "object": (lambda path: craft_object(path, COMMON, path.parent / "ran"), f"{COMMON} would import"),
    "common.pt": (lambda path: craft_common(path, path.parent / "ran"), "common.pt would import _io.open"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(directory: Path, kind: str) -> None:
    damage, named = DAMAGE[kind]
    damage(directory / "iter_0000006")
    report = repair(directory)
    assert report.newest is not None and report.newest.iteration == 4
    (aside,) = report.set_aside
    assert named in " ".join(aside.faults) and (directory / TRACKER).read_text() == "4"
    assert not (directory / "ran").exists()


def test_a_stock_load_takes_a_flipped_byte_for_what_was_saved(directory: Path) -> None:
    newest = directory / "iter_0000006"
    before = stock_load(newest)
    stored = pickle.loads((newest / ".metadata").read_bytes()).storage_data  # noqa: S301  our own
    (place,) = [info for index, info in stored.items() if index.fqn == "output_layer.weight"]
    # In the middle of the numbers, in the byte of the exponent.
    flip(newest / place.relative_path, place.offset + place.length // 2 // 4 * 4 + 3, 0x40)
    after = stock_load(newest)
    assert int((before != after).sum()) == 1
    assert repair(directory).set_aside[0].faults == [f"{place.relative_path} has other bytes than were saved"]


def stock_load(checkpoint: Path) -> torch.Tensor:
    state = {"output_layer.weight": torch.zeros(384, 64)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return state["output_layer.weight"]


@pytest.fixture
def again(stopped: RunFolder) -> Iterator[RunFolder]:
    """The run itself, put back as it was afterwards."""
    kept = stopped.path.with_name("kept")
    shutil.copytree(stopped.path, kept)
    yield stopped
    shutil.rmtree(stopped.path)
    kept.rename(stopped.path)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    again: RunFolder, small_jobs: SmallJobs
) -> None:
    measured = curve(again)
    flip(again.checkpoints / "iter_0000006" / "__1_0.distcp", 500_000, 0x10)
    assert small_jobs.run(WORDS) == again
    assert state(again).status == "finished"
    assert curve(again)[:6] == measured and len(curve(again)) == 8


def trusting() -> None:
    """In a rank: nobody looks into checkpoints before they are loaded."""
    from megaplug.runtime import pretrain

    pretrain.verify_what_is_loaded = lambda load: None


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody does so before ranks are started either."""
    monkeypatch.setattr(checkpoints, "faults_of", lambda *_: [])


@pytest.mark.slow
def test_rank_0_refuses_what_nobody_has_looked_into(
    again: RunFolder, small_jobs: SmallJobs, trusted: None
) -> None:
    flip(again.checkpoints / "iter_0000006" / "__1_0.distcp", 500_000, 0x10)
    with pytest.raises(RanksFailed, match=r"must not be loaded: __1_0\.distcp has other bytes"):
        small_jobs.run(WORDS)
    # As Megatron does it.
    assert small_jobs.run(WORDS, plant=trusting) == again
    assert len(curve(again)) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "repair_name"),
    [
        (COMMON, "objects-run-no-code"),
        ("rng_state/shard_0.0_1.1", "objects-run-no-code"),
        (".metadata", "metadata-runs-no-code"),
    ],
)
def test_megatron_runs_what_is_in_a_checkpoint_and_our_ranks_do_not(
    again: RunFolder,
    small_jobs: SmallJobs,
    trusted: None,
    tmp_path: Path,
    name: str,
    repair_name: str,
) -> None:
    marker, newest = tmp_path / "ran", again.checkpoints / "iter_0000006"
    if name == ".metadata":
        craft_metadata(newest, marker)
    else:
        craft_object(newest, name, marker)
    with pytest.raises(RanksFailed, match=r"_io\.open"):
        small_jobs.run(WORDS, plant=trusting)
    assert not marker.exists()
    with pytest.raises(RanksFailed):
        small_jobs.run(WORDS, plant=trusting, skip_repairs=frozenset({repair_name}))
    assert marker.exists()
