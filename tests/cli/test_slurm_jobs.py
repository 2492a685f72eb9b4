"""Jobs of a real SLURM: their losses are those of a run here, and nothing that stops one costs a step."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_command import about_runs, train
from local_slurm import KILL_WAIT_S, LocalSlurm, missing
from small_jobs import SMALL, write_corpus

from megaplug.launchers.slurm import queued
from megaplug.runs.folder import RunFolder
from megaplug.runs.history import read_events
from megaplug.runs.metrics import read_metrics
from megaplug.runs.state import read_state
from megaplug.runs.submitted import read_submitted

pytestmark = pytest.mark.slow

# Both go through gloo on one machine, in the same order.
TOLERANCE = 1e-6
ON_NODES = ("launch=slurm", "launch.master_addr=127.0.0.1", "device=cpu", "launch.grace_s=15")
ENDS_S = 480.0


class Submits:
    """Submits jobs of one folder of runs."""

    def __init__(self, slurm: LocalSlurm, place: Path) -> None:
        self.slurm = slurm
        self.place = place
        self.runs_dir = f'runs_dir="{place}"'

    def type(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Type a command beside the cluster."""
        return train(*words, self.runs_dir, env=self.slurm.environment)

    def submit(self, *words: str) -> tuple[RunFolder, list[str]]:
        """Submit a job; its folder, and its numbers."""
        done = self.type(*ON_NODES, "launch.output=json", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        return RunFolder(Path(said["folder"])), said["jobs"]

    def here(self, *words: str) -> RunFolder:
        """The same job by the local launcher, to its end."""
        done = train(*words, self.runs_dir, "name=here", timeout_s=ENDS_S)
        assert done.returncode == 0, done.stderr
        (found,) = self.place.glob("here-*")
        return RunFolder(found)

    def status(self, folder: RunFolder) -> str:
        state = read_state(folder.state_file)
        return "created" if state is None else state.status

    def steps(self, folder: RunFolder) -> int:
        return max((line["iteration"] for line in read_metrics(folder.metrics_file)), default=0)

    def until_step(self, folder: RunFolder, step: int) -> None:
        def has_come() -> bool:
            assert self.status(folder) != "failed", self.log(folder)
            return self.steps(folder) >= step

        self.slurm.wait(has_come, f"step {step}", ENDS_S)

    def until_ended(self, folder: RunFolder, job: str) -> None:
        self.slurm.wait(lambda: self.slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), "end", ENDS_S)
        assert self.status(folder) == "finished", self.log(folder)

    def stop(self, folder: RunFolder, job: str) -> None:
        """End a run for good, as a person does: what it has computed is saved, and it is not queued again."""
        done = about_runs("action=stop", f"run={folder.path}", env=self.slurm.environment)
        assert done.returncode == 0, done.stderr
        state = read_state(folder.state_file)
        assert state is not None and state.status == "stopped", self.log(folder)
        assert 0 < state.saved_iteration == state.iteration == max(losses(folder))
        ended = ("COMPLETED", "FAILED", "CANCELLED")
        self.slurm.wait(lambda: self.slurm.state(job) in ended, "its end", ENDS_S)

    def log(self, folder: RunFolder) -> str:
        return "\n".join(file.read_text() for file in folder.path.glob("slurm-*.log"))


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    """Four nodes with two cores each."""
    if why := missing():
        pytest.skip(f"there can be no SLURM here: {why}")
    # Sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="slurm-") as place, LocalSlurm(Path(place)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of which a step takes milliseconds."""
    place = tmp_path_factory.mktemp("small")
    return [*SMALL, f"data.path={write_corpus(place / 'corpus')}", f"data.cache_dir={place / 'cache'}"]


@pytest.fixture
def submits(slurm: LocalSlurm, tmp_path: Path) -> Iterator[Submits]:
    yield Submits(slurm, tmp_path / "runs of 'one' $HOME")


def losses(folder: RunFolder) -> dict[int, float]:
    """By step; a step that comes twice is one too many."""
    steps = [line for line in read_metrics(folder.metrics_file) if "loss" in line]
    found = {line["iteration"]: line["loss"] for line in steps}
    assert len(found) == len(steps)
    return found


def test_a_job_of_four_nodes_has_the_losses_of_a_run_here(submits):
    words = ("topology.pp=2", "topology.dp=2", "train.iters=6", "train.eval_iters=1")
    folder, (job,) = submits.submit(*words, "launch.nnodes=4", "name=nodes")
    submits.until_ended(folder, job)
    here = submits.here(*words, "device=cpu")
    assert losses(folder) == pytest.approx(losses(here), abs=TOLERANCE, rel=0)
    assert list(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert sorted(file.name for file in folder.logs.glob("*.log")) == [f"rank{rank}.log" for rank in range(4)]


@pytest.mark.timeout(900)
def test_whatever_stops_a_job_it_goes_on_in_its_folder_and_no_step_is_lost_or_repeated(submits, small):
    """USR2 from outside, the time limit, a requeue by hand and a node that dies, all in one run."""
    slurm = submits.slurm
    words = (*small, "topology.dp=2", "train.iters=100_000", "checkpoint.save_interval=200")
    folder, (job,) = submits.submit(*words, "launch.nnodes=2", "slurm.time=30", "slurm.signal_s=60")

    submits.until_step(folder, 20)
    slurm.ask("scancel", "--signal=USR2", job)
    slurm.wait(lambda: slurm.state(job) == "PENDING", "requeue after USR2")

    submits.until_step(folder, submits.steps(folder) + 20)
    # Its last minute, in which it is to be told, has begun then; SLURM looks twice a minute.
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    slurm.wait(lambda: slurm.state(job) == "PENDING", "requeue before the time limit", 120.0)
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    submits.until_step(folder, submits.steps(folder) + 20)
    slurm.ask("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.state(job) == "PENDING", "requeue by hand", KILL_WAIT_S + 30.0)

    submits.until_step(folder, submits.steps(folder) + 20)
    before = submits.steps(folder)
    node = slurm.ask("squeue", f"--jobs={job}", "--noheader", "--format=%N")
    slurm.kill_node("n2" if "2" in node else "n4")
    slurm.wait(lambda: slurm.state(job) == "PENDING", "requeue after a node's death", 120.0)
    slurm.start_node("n2" if "2" in node else "n4")

    submits.until_step(folder, submits.steps(folder) + 20)
    submits.stop(folder, job)
    events = read_events(folder.events_file)
    starts = [event["iteration"] for event in events if event["event"] == "start"]
    assert len(starts) == 5 and starts == sorted(starts) and starts[-1] >= before - 200, (starts, before)
    last = max(losses(folder))
    assert list(losses(folder)) == list(range(1, last + 1))
    here = submits.here(*words, f"train.stop_at={last}")
    assert losses(folder) == pytest.approx(losses(here), abs=TOLERANCE, rel=0)


def test_stopping_a_job_of_two_nodes_saves_its_last_step_and_queues_nothing(submits, small):
    words = (*small, "topology.dp=2", "train.iters=100_000", "checkpoint.save_interval=50_000")
    folder, (job,) = submits.submit(*words, "launch.nnodes=2")
    submits.until_step(folder, 20)
    submits.stop(folder, job)
    assert submits.slurm.ask("squeue", "--noheader", "--states=PENDING") == ""
    assert not folder.ended_file(job).exists()


def test_a_job_that_is_stopped_before_it_has_started_its_run_never_does(submits, small, tmp_path):
    setup = tmp_path / "setup.sh"
    setup.write_text("while true; do sleep 0.1; done\n")
    folder, (job,) = submits.submit(*small, f"slurm.setup={setup}")
    submits.slurm.wait(lambda: submits.slurm.state(job) == "RUNNING", "its begin")
    assert about_runs("action=stop", f"run={folder.path}", env=submits.slurm.environment).returncode == 0
    assert submits.slurm.state(job) == "CANCELLED"
    assert submits.steps(folder) == 0


def test_a_job_that_a_person_cancels_is_not_queued_again(submits, small):
    folder, (job,) = submits.submit(*small, "train.iters=4000", "launch.nnodes=1")
    submits.until_step(folder, 5)
    submits.slurm.ask("scancel", job)
    submits.slurm.wait(lambda: submits.slurm.state(job) == "CANCELLED", "its end")
    submits.slurm.wait(lambda: submits.status(folder) == "stopped", "its launcher's end")
    assert submits.slurm.ask("squeue", "--noheader") == ""
    assert submits.status(folder) == "stopped"


def test_a_run_that_waits_in_the_queue_is_not_submitted_twice(submits, small):
    words = (*small, "slurm.options.hold=''")
    _, (job,) = submits.submit(*words)
    again = submits.type(*ON_NODES, *words)
    assert again.returncode == 2
    assert f"is in the queue already: job {job} PENDING (JobHeldUser)" in again.stderr
    submits.slurm.ask("scancel", job)
    _, (other,) = submits.submit(*words)
    submits.slurm.ask("scancel", other)


def test_jobs_of_a_chain_wait_for_each_other_and_do_not_queue_themselves_again(submits, small, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", submits.slurm.environment["SLURM_CONF"])
    folder, jobs = submits.submit(*small, "slurm.chain=3", "slurm.options.hold=''")
    assert len(jobs) == 3
    submitted = read_submitted(folder)
    assert submitted is not None and submitted.jobs == tuple(jobs)
    waits_for = [submits.slurm.ask("squeue", f"--jobs={job}", "--noheader", "--format=%E") for job in jobs]
    assert [text.partition("(")[0] for text in waits_for] == [
        "",
        f"afterany:{jobs[0]}",
        f"afterany:{jobs[1]}",
    ]
    script = folder.batch_script.read_text()
    # Of several jobs those that SLURM has forgotten are passed over.
    submits.slurm.ask("scancel", jobs[2])
    assert set(queued(["999999", *jobs])) == set(jobs[:2])
    assert "#SBATCH --no-requeue" in script and "export MEGAPLUG_REQUEUE" not in script
    submits.slurm.ask("scancel", *jobs)


def test_what_slurm_refuses_is_said_in_its_own_words(submits, small):
    done = submits.type(*ON_NODES, *small, "slurm.partition=nowhere")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "SLURM refuses the job" in done.stderr and "invalid partition" in done.stderr


def test_a_sweep_is_one_array_whose_runs_go_on_like_any(submits, small):
    words = (*small, "-m", "train.seed=1,2,1", "lr.min_lr=0,1", "train.iters=5")
    done = submits.type(*ON_NODES, *words, "launch.output=json")
    assert done.returncode == 2, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["num_runs"] == 2 and said["num_impossible"] == 3 and said["num_repeated"] == 1
    (array,) = said["arrays"]
    runs = [point["run"] for point in said["points"] if point["status"] not in ("impossible", "repeat")]
    folders = [RunFolder(Path(run)) for run in runs]
    jobs = [read_submitted(folder).jobs for folder in folders]
    assert jobs == [(f"{array['job']}_0",), (f"{array['job']}_1",)]
    again = submits.type(*ON_NODES, *words)
    assert again.returncode == 2 and again.stderr.count("is in the queue already") == 2
    for folder, (job,) in zip(folders, jobs, strict=True):
        submits.until_ended(folder, job)
        assert list(losses(folder)) == [1, 2, 3, 4, 5]
    assert losses(folders[0]) != losses(folders[1])
    # Nothing is left, and the same command says so.
    assert (
        json.loads(submits.type(*ON_NODES, *words, "launch.output=json").stdout.splitlines()[-1])["arrays"]
        == []
    )
