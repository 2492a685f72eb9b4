"""Checkpoints that are written while training goes on: the same bytes, one at a time, whole or not there."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import RanksFailed
from small_jobs import SmallJobs, curve, state
from torch.distributed.checkpoint import FileSystemReader

from megaplug.runs.checkpoints import SAVING, TRACKER, list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import read_manifest, verify_manifest

WORDS = ["model.num_layers=2", "train.iters=6", "checkpoint.save_interval=2", "train.seed=21"]
TWO = [*WORDS, "topology.dp=2"]


def steps_of(folder: RunFolder) -> list[int]:
    return [found.iteration for found in list_checkpoints(folder.checkpoints)]


def the_run(small_jobs: SmallJobs, name: str) -> RunFolder:
    (run,) = (small_jobs.root / "runs").glob(f"{name}-*")
    return RunFolder(run)


def in_the_writer() -> bool:
    """Whether this process was forked by a rank to write."""
    return str(os.getpid()) != os.environ["RANK_PID"]


def in_each_write(act: Any) -> None:
    """Call ``act(stream)`` before each item that is written, wherever that is."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    os.environ["RANK_PID"] = str(os.getpid())
    real = filesystem_async._write_item

    @functools.wraps(real)  # Megatron looks at its signature
    def write_item(transforms: Any, stream: Any, data: Any, item: Any, key: str, **more: Any) -> Any:
        act(stream)
        return real(transforms, stream, data, item, key, **more)

    filesystem_async._write_item = write_item


def compare_states() -> None:
    """Every state that the distributed optimizer gives for saving is the one that Megatron would give."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    ours = DistributedOptimizer.get_parameter_state_dp_zero
    megatrons = ours.__wrapped__

    def compared(self: Any, **kwargs: Any) -> Any:
        mine, theirs = ours(self, **kwargs), megatrons(self, **kwargs)
        if not kwargs["empty_data"]:
            for index, buffer in enumerate(self.buffers):
                (dtype,) = theirs[index]
                for start, end, _ in buffer.param_index_map.values():
                    for key in ("param", *self.optimizer_state_keys):
                        assert mine[index][dtype][key][start:end].equal(theirs[index][dtype][key][start:end])
            print("compared")
        return mine

    DistributedOptimizer.get_parameter_state_dp_zero = compared


@pytest.fixture(scope="module")
def waiting(small_jobs: SmallJobs) -> RunFolder:
    """What training that waits for its checkpoints leaves."""
    words = [*TWO, "name=waiting", "checkpoint.async_save=false", "checkpoint.keep=9"]
    return small_jobs.run(words, plant=compare_states)


@pytest.fixture(scope="module")
def going_on(small_jobs: SmallJobs) -> RunFolder:
    """The same saved while training goes on, in two parts."""
    words = [*TWO, "name=going_on", "checkpoint.keep=9"]
    folder = small_jobs.run([*words, "train.stop_at=3"])
    assert (state(folder).status, state(folder).saved_iteration, steps_of(folder)) == ("stopped", 3, [2, 3])
    return small_jobs.run(words)


@pytest.mark.slow
def test_training_that_goes_on_from_one_is_the_same(waiting: RunFolder, going_on: RunFolder) -> None:
    assert curve(going_on) == curve(waiting)
    assert (steps_of(waiting), steps_of(going_on)) == ([2, 4, 6], [2, 3, 4, 6])
    assert not (going_on.checkpoints / SAVING).exists()
    assert (going_on.checkpoints / TRACKER).read_text() == "6"


def test_their_bytes_are_the_same(waiting: RunFolder, going_on: RunFolder) -> None:
    """But for what holds the paths and the names of the two."""
    # Of a run that has gone on the random states are other objects, if of the same values.
    for step, own in ((2, ("common_state",)), (4, ("common_state", "rng_state"))):
        one, other = (items_of(run.checkpoints / f"iter_{step:07d}") for run in (waiting, going_on))
        assert one.keys() == other.keys() and len(one) > 20
        assert [name for name in one if one[name] != other[name] and not name.startswith(own)] == []
        assert verify_manifest(going_on.checkpoints / f"iter_{step:07d}") == []


def items_of(checkpoint: Path) -> dict[str, bytes]:
    """What is stored, by name and place in the whole."""
    places = FileSystemReader(checkpoint).read_metadata().storage_data
    found = {}
    for index, info in places.items():
        with (checkpoint / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            found[f"{index.fqn} {index.offset}"] = file.read(info.length)
    return found


def test_the_writers_have_hashed_what_they_wrote(going_on: RunFolder) -> None:
    manifest = read_manifest(going_on.checkpoints / "iter_0000006")
    assert manifest is not None and {"__0_0.distcp", "__1_0.distcp"} < set(manifest["files"])


def test_what_the_optimizer_holds_was_compared_with_megatrons_own(
    small_jobs: SmallJobs, waiting: RunFolder
) -> None:
    logs = [path.read_text() for path in (small_jobs.root / "ranks").rglob("rank*.log")]
    assert sum(log.count("compared\n") for log in logs) == 6


def kill_the_rank(at_step: int) -> None:
    """The writer of rank 1 kills its rank in the middle of a shard, and then never ends by itself."""

    def act(stream: Any) -> None:
        wanted = f"iter_{at_step:07d}" in str(stream.name) and os.environ["RANK"] == "1"
        if wanted and in_the_writer() and stream.tell() > 0:
            stream.flush()
            os.kill(os.getppid(), signal.SIGKILL)
            while True:
                signal.pause()

    in_each_write(act)


@pytest.mark.slow
def test_a_rank_killed_while_its_writer_writes_leaves_no_checkpoint(
    small_jobs: SmallJobs, waiting: RunFolder
) -> None:
    words = [*TWO, "name=killed_writing"]
    with pytest.raises(RanksFailed):
        small_jobs.run(words, plant=functools.partial(kill_the_rank, 4))
    folder = the_run(small_jobs, "killed_writing")
    assert steps_of(folder) == [2] and (folder.checkpoints / TRACKER).read_text() == "2"
    left = folder.checkpoints / SAVING / "iter_0000004"
    assert (left / "__1_0.distcp").stat().st_size > 0 and not (left / "metadata.json").exists()
    assert small_jobs.run(words) == folder
    assert not (folder.checkpoints / SAVING).exists() and steps_of(folder) == [4, 6]
    assert curve(folder) == curve(waiting)


def fail(how: str) -> None:
    def act(stream: Any) -> None:
        if "iter_0000004" in str(stream.name) and os.environ["RANK"] == "1" and stream.tell() > 0:
            if how == "killed":
                assert in_the_writer()
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")

    in_each_write(act)


@pytest.mark.parametrize(
    ("how", "async_save", "said"),
    [
        ("full", "true", r"cannot write \S+/iter_0000004/__1_0\.distcp: No space left on device"),
        pytest.param(
            "full",
            "false",
            r"cannot write \S+/iter_0000004/__1_0\.distcp: No space left on device",
            marks=pytest.mark.slow,
        ),
        ("killed", "true", "a helper process of this rank has gone"),
    ],
)
def test_a_writer_that_fails_ends_the_run_with_its_checkpoint_and_its_file(
    small_jobs: SmallJobs, how: str, async_save: str, said: str
) -> None:
    name = f"{how}_{async_save}"
    words = [*TWO, f"name={name}", f"checkpoint.async_save={async_save}"]
    with pytest.raises(RanksFailed, match=rf"cannot save the checkpoint of step 4: rank 1: {said}"):
        small_jobs.run(words, plant=functools.partial(fail, how))
    assert steps_of(the_run(small_jobs, name)) == [2]


def finish_only_when_waited_for() -> None:
    """A writer ends no sooner than its rank waits for it, and says which phase that is."""
    from megatron.training import training

    from megaplug.runtime.heartbeat import here

    waits, waited = os.pipe()
    real = training.maybe_finalize_async_save
    done: set[str] = set()

    def act(stream: Any) -> None:
        if in_the_writer() and str(stream.name) not in done:
            done.add(str(stream.name))
            os.read(waits, 1)

    def finalize(blocking: bool = False, terminate: bool = False) -> None:
        from megatron.training.checkpointing import is_empty_async_queue

        if blocking and not is_empty_async_queue():
            print(f"waits in phase {here.phase}", flush=True)
            os.write(waited, b"x")
        real(blocking, terminate)

    training.maybe_finalize_async_save = finalize
    in_each_write(act)


def test_one_is_complete_before_the_next_begins_and_before_the_end(small_jobs: SmallJobs) -> None:
    words = [*WORDS, "name=slow", "train.iters=3", "checkpoint.save_interval=1", "checkpoint.keep=3"]
    folder = small_jobs.run(words, plant=finish_only_when_waited_for)
    assert steps_of(folder) == [1, 2, 3] and state(folder).saved_iteration == 3
    log = max((small_jobs.root / "ranks").rglob("rank0.log"), key=lambda path: path.parent.name).read_text()
    assert "before previous has finished" not in log
    assert log.count("waits in phase saving") == 3


def signal_while_writing() -> None:
    """The writer sends SIGINT and SIGTERM to its rank and to itself, as a terminal's Ctrl-C may."""

    def act(stream: Any) -> None:
        if "iter_0000002" in str(stream.name) and in_the_writer():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
                os.kill(os.getppid(), number)

    in_each_write(act)


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_written_completes_it_and_saves_where_the_run_is(
    small_jobs: SmallJobs, waiting: RunFolder
) -> None:
    words = [*TWO, "name=signalled", "checkpoint.keep=9"]
    folder = small_jobs.run(words, plant=signal_while_writing)
    found = state(folder)
    assert (found.status, found.reason) == ("stopped", "signal")
    assert steps_of(folder) == sorted({2, found.iteration}) and found.saved_iteration == found.iteration
    assert curve(folder) == curve(waiting)[: found.iteration]


FORMATS = {
    "nothing shared out": ["topology.dp=2", "topology.zero=0"],
    "torch FSDP2": ["topology.dp=2", "topology.zero=3", "topology.fsdp=torch"],
    "four ranks": ["topology=tp2_pp2", "topology.dp=1"],
    "experts": ["moe=small", "topology=ep2"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=pytest.mark.soak if name == "nothing shared out" else ())
        for name, words in FORMATS.items()
    ],
)
def test_every_format_that_a_cpu_has_goes_on_from_one(small_jobs: SmallJobs, words: list[str]) -> None:
    name = "_".join(words).replace("=", "").replace(".", "")
    whole = small_jobs.run([*WORDS, *words, f"name={name}_waits", "checkpoint.async_save=false"])
    parts = [*WORDS, *words, f"name={name}", "checkpoint.async_save=true"]
    small_jobs.run([*parts, "train.stop_at=3"])
    assert curve(small_jobs.run(parts)) == curve(whole)
