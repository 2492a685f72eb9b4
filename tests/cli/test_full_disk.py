"""A disk that is too small, fills up, or may not be written to: a tmpfs that only this test sees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_command import Live, joined_curve, newest_whole, only_run, processes_of
from small_checkpoints import make_checkpoint
from small_jobs import SMALL, SmallJobs, state

from megaplug.runs.checkpoints import faults_of
from megaplug.runs.folder import RunFolder

MIB = 1 << 20
# 123,200 parameters of 16 bytes, three checkpoints: the launcher asks for 5.9 MB.
MODEL = [*SMALL, "model.num_layers=2", "train.global_batch_size=4", "train.micro_batch_size=4"]


@dataclass
class Disk:
    """A small file system in a mount namespace of its own.

    Attributes:
        keeper: The process that keeps the namespace.
        inside: Where it is mounted, for commands that run inside.
    """

    keeper: subprocess.Popen[str]
    inside: Path

    @property
    def outside(self) -> Path:
        """The same for this process."""
        return Path(f"/proc/{self.keeper.pid}/root{self.inside}")

    @property
    def prefix(self) -> list[str]:
        """Runs a command inside."""
        enter = ["nsenter", "--user", "--mount", "--preserve-credentials", f"--target={self.keeper.pid}"]
        return [*enter, f"--wd={Path.cwd()}"]

    def remount_read_only(self) -> None:
        """From now on nothing can be written."""
        command = [*self.prefix, "mount", "-o", "remount,ro", str(self.inside)]
        subprocess.run(command, check=True)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """One of as many bytes as the test asks for."""
    inside = tmp_path / "disk"
    inside.mkdir()
    script = f'mount -t tmpfs -o size={request.param} none "$0" && echo mounted && exec cat'
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("unshare and nsenter (util-linux) are not installed")
    keeper = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(inside)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert keeper.stdout is not None
    if keeper.stdout.readline() != "mounted\n":
        pytest.skip(f"this machine lets no user mount a file system: {keeper.communicate()[1].strip()}")
    yield Disk(keeper, inside)
    keeper.communicate()


@pytest.fixture
def words(small_jobs: SmallJobs) -> list[str]:
    places = [f"data.path={small_jobs.corpus}", f"data.cache_dir={small_jobs.root / 'cache'}"]
    return [*MODEL, "train.iters=20", "checkpoint.save_interval=5", *places]


def refused(words: list[str], disk: Disk) -> str:
    """What is said of a disk before any rank starts."""
    with Live([*words, f"runs_dir={disk.inside / 'runs'}"], disk.prefix) as live:
        assert live.end() == 2
        said = live.stderr()
    assert "Traceback" not in said and said.startswith("error: ")
    assert not list(disk.outside.glob("runs/*/logs/*"))
    return said


@pytest.mark.parametrize("disk", [2 * MIB], indirect=True)
def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(disk: Disk, words: list[str]) -> None:
    said = refused(words, disk)
    assert f"the disk of {disk.inside} has 2.1 MB left" in said
    assert "runs_dir" in said.partition("hint: ")[2]


@pytest.mark.parametrize("disk", [64 * MIB], indirect=True)
def test_a_disk_that_may_not_be_written_to_is_named(disk: Disk, words: list[str]) -> None:
    disk.remount_read_only()
    said = refused(words, disk)
    assert f"{disk.inside / 'runs'}: Read-only file system" in said
    assert "runs_dir" in said.partition("hint: ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("disk", [16 * MIB], indirect=True)
def test_a_disk_that_fills_up_ends_the_run_and_with_room_the_same_command_goes_on(
    disk: Disk, words: list[str]
) -> None:
    words = [*words, f"runs_dir={disk.inside / 'runs'}", "watch.max_restarts=2"]
    with Live(words, disk.prefix) as live:
        live.until(lambda event: event["event"] == "saved")
        filler = disk.outside / "filler"
        with filler.open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk.outside).free - MIB // 4))
        assert live.end() == 1
        said = live.stderr()
    folder = only_run(disk.outside / "runs")
    assert "Traceback" not in said
    assert live.summary["status"] == "failed"
    said = live.summary["reason"]
    # The save, or the figures of the step before it, whichever comes first to the last free page.
    where = r"(\S+ while saving step [0-9]+|its disk at step [0-9]+)"
    assert re.fullmatch(rf"rank 0 failed: no space left on {where}", said)
    assert live.summary["num_restarts"] == 0 and live.summary["log_tail"] == []
    assert "# once the disk takes it: goes on from step " in live.summary["next_command"]
    hint = live.summary["hint"]
    assert f"the disk of {disk.inside}/runs/{folder.name} is full" in hint and "runs_dir" in hint
    assert processes_of(RunFolder(disk.inside / "runs" / folder.name)) == []
    whole = newest_whole(folder)
    assert whole >= 5

    # Not as much as a run from its start would need: it has checkpoints already.
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size + shutil.disk_usage(disk.outside).free - 9 * MIB // 2)
    with Live(words, disk.prefix) as again:
        assert again.end() == 0, again.stderr()
    assert again.of("header")[0]["resumes"] == f"from step {whole}"
    assert (state(folder).status, state(folder).iteration) == ("finished", 20)
    assert [line[0] for line in joined_curve(folder)] == list(range(1, 21))


PICTURES = [sys.executable, "launch/plan.py", "model=llama3_8b", "cluster=h100", "precision=bf16"]


def drawn(disk: Disk, *words: str) -> subprocess.CompletedProcess[str]:
    """A plan whose pictures go to the disk."""
    command = [*disk.prefix, *PICTURES, "topology.world_size=16", "topology.tp=4", "topology.pp=2", *words]
    return subprocess.run(
        [*command, f"pictures={disk.inside}/new"], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("disk", ["72k"], indirect=True)
def test_pictures_on_a_disk_that_fills_up_are_whole_or_not_there(disk):
    done = drawn(disk)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: cannot write {disk.inside}/new/")
    assert "No space left on device" in done.stderr and "choose another with pictures=" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    left = sorted((disk.outside / "new").iterdir())
    assert left and all(path.suffix in (".png", ".json") for path in left)
    for path in left:
        content = path.read_bytes()
        assert content.endswith(b"IEND\xaeB`\x82") if path.suffix == ".png" else json.loads(content)


@pytest.mark.parametrize("disk", ["1m"], indirect=True)
def test_pictures_for_a_folder_that_may_not_be_written_to_are_refused(disk):
    disk.remount_read_only()
    done = drawn(disk)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Read-only file system" in done.stderr and len(done.stderr.splitlines()) == 2
    done = drawn(disk, "output=json")
    assert (done.returncode, done.stderr) == (2, "")
    (problem,) = json.loads(done.stdout)["problems"]
    assert "Read-only file system" in problem["message"] and "pictures=" in problem["hint"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of 17 kB in four files."""
    return make_checkpoint(tmp_path / "saved", 10)


def copied(disk: Disk, source: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A copy of a checkpoint to the disk."""
    command = [*disk.prefix, sys.executable, "launch/checkpoint.py", "action=copy", f"path={source}"]
    return subprocess.run(
        [*command, f"to={disk.inside}/copies", *words], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("disk", ["16k"], indirect=True)
def test_a_copy_to_a_disk_that_is_too_small_is_refused_before_it_begins(disk, saved):
    done = copied(disk, saved)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"has [\d.]+ kB left, and [\d.]+ kB are to be copied", done.stderr)
    assert "to=" in done.stderr.partition("hint: ")[2]
    assert not any(path.is_file() for path in disk.outside.rglob("*"))


# Room for its bytes, and none for its fourth file: the root, copies, its folder and three files.
@pytest.mark.parametrize("disk", ["1m,nr_inodes=6"], indirect=True)
def test_a_copy_to_a_disk_that_fills_up_has_no_name_and_goes_on_with_room(disk, saved):
    done = copied(disk, saved)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 2
    assert [path.name for path in (disk.outside / "copies").iterdir()] == [".iter_0000010.copying"]
    subprocess.run([*disk.prefix, "mount", "-o", "remount,nr_inodes=20", str(disk.inside)], check=True)
    again = copied(disk, saved, "output=json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["num_bytes_found"] > 0
    assert faults_of(disk.outside / "copies" / "iter_0000010") == []


@pytest.mark.parametrize("disk", ["1m"], indirect=True)
def test_on_a_disk_that_may_not_be_written_to_checkpoints_are_read_and_nothing_else(disk, saved):
    assert copied(disk, saved).returncode == 0
    disk.remount_read_only()
    assert "exists already" in copied(disk, saved).stderr
    newer = make_checkpoint(saved.parent, 20)
    done = copied(disk, newer)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Read-only file system" in done.stderr and "to=" in done.stderr.partition("hint: ")[2]
    run = f"run={disk.inside}/copies"
    for words, code in [(["action=verify"], 0), (["action=show"], 0), (["action=prune", "keep=1"], 0)]:
        command = [*disk.prefix, sys.executable, "launch/checkpoint.py", run, *words]
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == code
