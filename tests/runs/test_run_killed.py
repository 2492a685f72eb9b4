"""SIGKILL at every operation that changes the disk: there is what was or what will be, never neither.

A process is forked for each, counts what it is about to do to files and folders, and kills itself there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_jobs import SmallJobs

from megaplug.runs.atomic import remove_unfinished, write_json_atomic
from megaplug.runs.checkpoints import SAVING, SET_ASIDE, TRACKER, list_checkpoints, repair
from megaplug.runs.hashed import hashing_open
from megaplug.runs.manifest import verify_manifest
from megaplug.runs.metrics import append_metrics, cut_metrics, read_metrics
from megaplug.runs.retention import Retention, prune
from megaplug.runs.saving import beside, complete
from megaplug.runs.state import RunState, read_state, write_state

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def is_killed_at(point: int, act: Callable[[], object]) -> bool:
    """Whether a process that does something and dies at its n-th operation on the disk has come so far."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _die_at(point)
            act()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _die_at(point: int) -> None:
    left = point

    def step() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hear(event: str, args: tuple[object, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            step()

    real = os.fsync

    def fsync(fd: int) -> None:
        step()
        real(fd)

    os.fsync = fsync
    sys.addaudithook(hear)


def points(prepare: Callable[[], None], act: Callable[[], object], least: int) -> Iterator[int]:
    """Every point of something, each time from the beginning; the last one is that it is done."""
    for point in range(1000):
        prepare()
        killed = is_killed_at(point, act)
        yield point
        if not killed:
            break
    assert least <= point < 999, f"{point} points"


def save(directory: Path, iteration: int) -> None:
    """What Megatron leaves beside, and its completion."""
    folder = beside(directory) / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    opened = hashing_open(beside(directory))
    for rank in range(2):
        with opened(folder / f"__{rank}_0.distcp", "wb") as file:
            file.write(f"weights of {iteration} by {rank}".encode() * 100)
    (folder / "metadata.json").write_text("{}")
    complete(directory, iteration)


def begin(directory: Path, *iterations: int) -> None:
    """A folder with whole checkpoints, and nothing else."""
    shutil.rmtree(directory, ignore_errors=True)
    for iteration in iterations:
        save(directory, iteration)
    shutil.rmtree(directory / SAVING)


def assert_in_order(directory: Path, point: int) -> int:
    """What has a name is whole; a start finds it, leaves nothing else behind, and saves again. Its step."""
    for found in list_checkpoints(directory):
        assert verify_manifest(found.path) == [], f"{found.path} after operation {point}"
    newest = max(found.iteration for found in list_checkpoints(directory))
    report = repair(directory)
    assert report.newest is not None and report.newest.iteration == newest
    assert report.set_aside == []
    assert (directory / TRACKER).read_text() == str(newest)
    rest = {path.name for path in directory.iterdir()} - {TRACKER, SET_ASIDE}
    assert rest == {found.path.name for found in list_checkpoints(directory)}, f"after operation {point}"
    save(directory, 90)
    assert repair(directory).newest.iteration == 90  # type: ignore[union-attr]
    return newest


def test_a_save_with_its_removal_of_old_ones(tmp_path: Path) -> None:
    run, seen, kept = tmp_path / "run", set(), set()

    def act() -> None:
        save(run, 30)
        prune(run, Retention(keep=1), {})

    for point in points(lambda: begin(run, 10, 20), act, least=30):
        kept.add(tuple(found.iteration for found in list_checkpoints(run)))
        seen.add(assert_in_order(run, point))
    assert seen == {20, 30}
    assert kept == {(10, 20), (10, 20, 30), (20, 30), (30,)}


def test_a_save_under_a_name_that_is_taken(tmp_path: Path) -> None:
    run, seen = tmp_path / "run", set()
    for point in points(lambda: begin(run, 10, 20), lambda: save(run, 20), least=20):
        seen.add(assert_in_order(run, point))
        assert 10 in {found.iteration for found in list_checkpoints(run)}
    assert seen == {10, 20}


def test_a_start_that_repairs(tmp_path: Path) -> None:
    """The newest is broken, one was never completed, one is half removed, and the tracker names another."""
    run, seen = tmp_path / "run", set()

    def damage() -> None:
        begin(run, 10, 20, 30)
        (run / "iter_0000030" / "__0_0.distcp").write_bytes(b"other bytes")
        (run / "iter_0000010").rename(run / "old")
        (run / SAVING / "iter_0000040").mkdir(parents=True)
        (run / SAVING / "iter_0000040" / "__0_0.distcp").write_bytes(b"half")
        (run / "old").rename(run / SAVING / "old_iter_0000010")

    for point in points(damage, lambda: repair(run), least=8):
        broken = [found for found in list_checkpoints(run) if verify_manifest(found.path)]
        assert [found.iteration for found in broken] in ([30], [])
        assert repair(run).newest.iteration == 20  # type: ignore[union-attr]
        seen.add(assert_in_order(run, point))
        assert len(list((run / SET_ASIDE).iterdir())) == 1
    assert seen == {20}


def test_a_state_is_the_one_before_or_the_one_after(tmp_path: Path) -> None:
    file, seen = tmp_path / "state.json", set()

    def before() -> None:
        write_state(file, RunState("running", iteration=1))

    for _ in points(before, lambda: write_state(file, RunState("finished", iteration=2)), least=4):
        found = read_state(file)
        assert found is not None
        seen.add((found.status, found.iteration))
    assert seen == {("running", 1), ("finished", 2)}


def test_metrics_that_are_cut_lose_nothing_that_counts(tmp_path: Path) -> None:
    file, seen = tmp_path / "metrics.jsonl", set()

    def before() -> None:
        file.unlink(missing_ok=True)
        for iteration in range(1, 6):
            append_metrics(file, {"iteration": iteration, "loss": 1.0})
        with file.open("a") as torn:
            torn.write('{"iteration": 6, "lo')

    for _ in points(before, lambda: cut_metrics(file, 3), least=4):
        seen.add(tuple(line["iteration"] for line in read_metrics(file)))
        cut_metrics(file, 3)
        assert file.read_text() == "".join(
            json.dumps({"iteration": iteration, "loss": 1.0}) + "\n" for iteration in (1, 2, 3)
        )
    assert seen == {(1, 2, 3), (1, 2, 3, 4, 5)}


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    mine = [tmp_path / ".mine.tmp", tmp_path / "notes.123.tmp", tmp_path / ".state.json.x.tmp"]
    for path in mine:
        path.write_text("mine")
    left = 0
    for _ in points(lambda: None, lambda: write_json_atomic(file, {"a": 1}), least=4):
        left = max(left, len(remove_unfinished(tmp_path)))
        assert sorted({*tmp_path.iterdir()} - {file}) == sorted(mine)
    assert left == 1
    (tmp_path / ".state.json.1234.tmp").touch()  # as earlier versions named them
    assert len(remove_unfinished(tmp_path)) == 1
    assert remove_unfinished(tmp_path / "nowhere") == []


def test_a_start_removes_what_was_being_written_when_the_last_was_killed(small_jobs: SmallJobs) -> None:
    folder, _ = small_jobs.freeze(["name=unfinished"])
    folder.tensorboard.mkdir()
    left = [folder.path / ".state.json.1.tmp", folder.tensorboard / ".events.out.tfevents.1.tmp"]
    for path in left:
        path.write_text("{")
    small_jobs.freeze(["name=unfinished"])
    assert [path for path in left if path.exists()] == []
    assert folder.job_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["name before manifest", "tracker before name", "removed under its name"])
def test_these_tests_find(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them was how it is done elsewhere, or how it might be done."""
    from megaplug.runs import retention, saving

    if wrong == "name before manifest":
        real = saving.write_manifest

        def late(folder: Path, *_: object) -> None:
            target = folder.parent.parent / folder.name
            folder.rename(target)
            real(target)
            target.rename(folder)

        monkeypatch.setattr(saving, "write_manifest", late)
    elif wrong == "tracker before name":
        first = saving.read_notes

        def early(folder: Path) -> object:
            for old in list_checkpoints(folder.parent.parent):
                shutil.rmtree(old.path)
            return first(folder)

        monkeypatch.setattr(saving, "read_notes", early)
    else:
        monkeypatch.setattr(retention, "delete", lambda found: shutil.rmtree(found.path))
    with pytest.raises((AssertionError, ValueError)):
        test_a_save_with_its_removal_of_old_ones(tmp_path)
