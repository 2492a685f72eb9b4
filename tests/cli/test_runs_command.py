"""``launch/runs.py``: what a person types about runs, and what is answered."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from live_command import Live, await_nobody
from quick_answers import assert_quick
from small_jobs import SMALL, write_corpus

from megaplug.commands import runs as command
from megaplug.commands import train
from megaplug.job.checks import resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.derive import derive
from megaplug.job.facts import DataFacts
from megaplug.job.freeze import FrozenJob, write_frozen
from megaplug.runs.folder import RunFolder
from megaplug.runs.history import append_event
from megaplug.runs.lock import RunLock
from megaplug.runs.metrics import append_metrics, cut_metrics
from megaplug.runs.standing import wait_until_free
from megaplug.runs.state import RunState, write_state

ROOT = Path(__file__).resolve().parents[2]


def make_run(name: str, *words: str, losses: tuple[float, ...] = (), status: str = "finished") -> RunFolder:
    """A run's folder as if its job had trained; ``()`` is one that has no step yet."""
    folder = RunFolder(Path("runs") / name)
    folder.path.mkdir(parents=True)
    job = compose_job(list(words))
    counts = {"train": 1_000_000, "valid": 50_000, "test": 0}
    facts = DataFacts("f" * 32, {}, counts, counts, 257, 3.2, "a test", 256, "bytes", [])
    topology = resolve_topology(job)
    derived = derive(job, topology, facts, device="cpu", backend="native")
    write_frozen(FrozenJob(job, topology, derived, facts, [], "0123abcd", {}, "", "0", folder))
    for step, loss in enumerate(losses, start=1):
        line = {"iteration": step, "loss": loss, "tokens": 100 * step, "tokens_per_second": 50.0 * step}
        append_metrics(folder.metrics_file, line)
    if losses:
        append_metrics(
            folder.metrics_file, {"iteration": len(losses), "valid_loss": losses[-1] + 1, "split": "valid"}
        )
    write_state(folder.state_file, RunState(status, len(losses), len(losses) // 2, 20, "because"))
    folder.lock_file.touch()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs, which every test gets a copy of."""
    place = tmp_path_factory.mktemp("of-all")
    with contextlib.chdir(place):
        make_run("small-1111aaaa", "lr.lr=1e-3", losses=(5.0, 4.0, 3.0))
        make_run("small-2222bbbb", "lr.lr=2e-3", "topology.dp=2", losses=(5.0, 4.5), status="failed")
        make_run("small-3333cccc", "lr.lr=1e-3", "name=other", losses=(5.0,) * 15, status="running")
        make_run("wide-4444dddd", "lr.lr=1e-3", "model.hidden_size=256", status="stopped")
    (place / "runs" / "notes").mkdir()
    return place / "runs"


@pytest.fixture
def there(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four runs in ``runs``; it is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs, "runs")
    return tmp_path


def typed(*words: str) -> int:
    return command.main(list(words))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert typed(*words, "output=json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert typed(*words) == 2
    return capsys.readouterr().err


def test_a_list_has_state_step_losses_and_speed_of_every_run(there, capsys):
    runs = {run["run"]: run for run in told(capsys)["runs"]}
    assert {name: run["status"] for name, run in runs.items()} == {
        "small-1111aaaa": "finished",
        "small-2222bbbb": "failed",
        # It says that it runs, and nobody has its lock.
        "small-3333cccc": "killed",
        "wide-4444dddd": "stopped",
    }
    one = runs["small-1111aaaa"]
    assert (one["iteration"], one["saved_iteration"], one["iters"]) == (3, 1, 20)
    assert one["figures"] == {
        "iteration": 3,
        "tokens": 300,
        "loss": 4.0,
        "valid_loss": 4.0,
        "best_valid_loss": 4.0,
        "tokens_per_second": 100.0,
    }
    # Of the last ten of its fifteen steps.
    assert runs["small-3333cccc"]["figures"]["tokens_per_second"] == 525.0
    assert runs["wide-4444dddd"]["figures"]["loss"] is None


def test_a_list_says_what_differs_between_the_jobs_and_no_more(there, capsys):
    found = told(capsys)
    assert set(found["differing"]) == {"lr.lr", "topology.dp", "model.hidden_size"}
    differs = {run["run"]: run["differs"] for run in found["runs"]}
    assert differs["small-2222bbbb"]["lr.lr"] == 2e-3 and differs["small-2222bbbb"]["topology.dp"] == 2
    assert told(capsys, "run=[small-1111aaaa,small-3333cccc]")["differing"] == []
    assert typed() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"]
    after = {line.split()[0]: lines[number + 1 :] for number, line in enumerate(lines)}
    assert "lr.lr=0.002" in after["small-2222bbbb"][0] and after["small-2222bbbb"][1].strip() == "because"
    assert "goes on from step 7" in after["small-3333cccc"][1]


def test_where_there_is_no_run_yet_a_list_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told(capsys)["runs"] == []
    assert typed() == 0 and "no run in runs yet" in capsys.readouterr().out


def test_a_run_with_a_held_lock_runs_and_names_its_process(there, capsys):
    folder = RunFolder(there / "runs" / "small-3333cccc")
    with RunLock.acquire(folder, "x"):
        (run,) = told(capsys, "run=small-3*")["runs"]
        assert (run["status"], run["process"]) == (
            "running",
            {"pid": os.getpid(), "host": socket.gethostname()},
        )
        (run,) = told(capsys, "run=small-1*")["runs"]
    assert (run["status"], run["process"]) == ("finished", None)


def test_brackets_are_a_list_or_a_part_of_a_pattern(there, capsys):
    def names(run: str) -> list[str]:
        return [found["run"] for found in told(capsys, f"run={run}")["runs"]]

    assert names("[small-2*, small-1111aaaa]") == ["small-2222bbbb", "small-1111aaaa"]
    assert names("small-*[ab]") == ["small-1111aaaa", "small-2222bbbb"]


def test_a_damaged_file_is_a_fault_of_its_run_alone(there, capsys):
    (there / "runs/small-1111aaaa/state.json").write_text("{")
    (there / "runs/small-2222bbbb/job.yaml").write_text("job: [")
    (there / "runs/wide-4444dddd/job.yaml").unlink()
    runs = {run["run"]: run for run in told(capsys)["runs"]}
    assert runs["small-1111aaaa"]["status"] == "unreadable"
    assert "state.json" in runs["small-1111aaaa"]["fault"]
    assert runs["small-2222bbbb"]["status"] == "failed" and "job.yaml" in runs["small-2222bbbb"]["fault"]
    assert runs["small-2222bbbb"]["differs"] is None and runs["wide-4444dddd"]["differs"] is None


@pytest.mark.parametrize("name", ["state.json", "metrics.jsonl", "job.yaml", "events.jsonl", "slurm.json"])
def test_bytes_that_are_no_text_hide_no_other_run(there, capsys, name):
    (there / "runs" / "small-1111aaaa" / name).write_bytes(b"\xff\xfe\n")
    assert len(told(capsys)["runs"]) == 4
    assert typed("run=small-1111aaaa") == 0


def test_a_comparison_has_a_column_for_each_key_and_a_picture(there, capsys):
    assert typed("action=compare", "run=small-*") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["topology.dp", "lr.lr"]
    assert rows[1].split()[-2:] == ["2", "0.002"]
    png = there / "runs" / "comparison.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert told(capsys, "action=compare", "run=small-*", "picture=here.png")["picture"] == "here.png"
    assert (there / "here.png").is_file()


def test_a_picture_is_beside_its_runs_wherever_they_are(there, capsys, monkeypatch):
    (there / "elsewhere").mkdir()
    monkeypatch.chdir(there / "elsewhere")
    assert told(capsys, "action=compare", "run=../runs/small-*")["picture"] == "../runs/comparison.png"
    assert (there / "runs" / "comparison.png").is_file()


def test_runs_without_a_step_are_compared_without_a_picture(there, capsys):
    make_run("wide-5555eeee")
    assert told(capsys, "action=compare", "run=wide-*")["picture"] is None
    assert not (there / "runs" / "comparison.png").exists()


def test_a_removed_run_is_gone_and_one_that_runs_stays(there, capsys):
    assert typed("action=remove", "run=small-*") == 0
    said = capsys.readouterr().out
    assert "nothing was" in said and "yes=true" in said and (there / "runs/small-1111aaaa").is_dir()
    with RunLock.acquire(RunFolder(there / "runs" / "small-2222bbbb"), "somebody's command"):
        assert "somebody's command" in refused(capsys, "action=remove", "run=small-2222bbbb", "yes=true")
    assert told(capsys, "action=remove", "run=small-*", "yes=true")["deleted"] is True
    assert [path.name for path in sorted((there / "runs").iterdir())] == ["notes", "wide-4444dddd"]


def test_what_is_left_of_a_run_that_cannot_be_deleted_is_named(there, capsys, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    (there / "runs" / "small-1111aaaa" / "logs").mkdir()
    said = refused(capsys, "action=remove", "run=small-1111aaaa", "yes=true")
    (left,) = (there / "runs").glob(".small-1111aaaa.removed-*")
    assert f"cannot delete all of runs/{left.name}" in said


def test_a_link_to_a_run_is_not_removed_for_it(there, capsys):
    (there / "runs" / "best").symlink_to("small-1111aaaa")
    said = refused(capsys, "action=remove", "run=best", "yes=true")
    assert f"run={there}/runs/small-1111aaaa deletes" in said
    assert (there / "runs" / "best" / "job.yaml").is_file()


def test_following_a_run_that_has_ended_shows_its_last_steps(there, capsys):
    assert typed("action=follow", "run=small-3*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["step", "15", "loss", "5.0000", "750", "tokens/s"]
    assert lines[-2].split() == ["step", "15", "valid", "loss", "6.0000"]
    assert lines[-1] == "small-3333cccc is killed at step 15: because"
    log = there / "runs/small-3333cccc/logs/rank0.log"
    log.parent.mkdir()
    log.write_text("one\ntwo\n")
    assert typed("action=follow", "run=small-3*", "rank=0") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["one", "two"]
    assert "there are rank0.log" in refused(capsys, "action=follow", "run=small-3*", "rank=1")


def test_a_program_that_follows_reads_an_object_a_line(there, capsys):
    assert typed("action=follow", "run=small-3*", "output=json") == 0
    *steps, valid, answer = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(line["event"], line["iteration"]) for line in steps] == [("step", step) for step in range(7, 16)]
    assert (valid["event"], valid["valid_loss"]) == ("valid", 6.0)
    assert (answer["event"], answer["action"], answer["run"]["status"]) == ("answer", "follow", "killed")
    log = RunFolder(there / "runs" / "small-3333cccc").log_file(0)
    log.parent.mkdir()
    log.write_text('{"one"\n')
    assert typed("action=follow", "run=small-3*", "rank=0", "output=json") == 0
    said, answer = map(json.loads, capsys.readouterr().out.splitlines())
    assert said == {"event": "line", "rank": 0, "text": '{"one"'} and answer["event"] == "answer"
    assert typed("action=follow", "run=small-3*", "rank=1", "output=json") == 2
    (mistake,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "no log of rank 1" in mistake["problems"][0]["message"]


def test_nobody_is_followed_for_a_reader_that_has_left(there):
    read, write = os.pipe()
    os.close(read)
    with RunLock.acquire(RunFolder(there / "runs" / "small-3333cccc"), "x"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / "runs.py"), "action=follow", "run=small-3*"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_log_is_shown_line_by_line_in_whatever_pieces_it_is_written(there, capsys, monkeypatch):
    folder = RunFolder(there / "runs" / "small-3333cccc")
    folder.logs.mkdir()
    text = "one\nGrüße\nits last words".encode()
    cut = text.index("ü".encode()) + 1
    folder.log_file(0).write_bytes(text[:cut])
    lock = RunLock.acquire(folder, "x")

    def end(_: float) -> None:
        folder.log_file(0).write_bytes(text)
        lock.release()

    monkeypatch.setattr("megaplug.commands.runs_follow.time.sleep", end)
    assert typed("action=follow", "run=small-3*", "rank=0") == 0
    assert capsys.readouterr().out.splitlines()[:-1] == ["one", "Grüße", "its last words"]


def test_what_is_measured_again_is_shown_again_and_not_all_before_it(there, capsys, monkeypatch):
    folder = RunFolder(there / "runs" / "small-3333cccc")
    lock = RunLock.acquire(folder, "x")

    def start_again(_: float) -> None:
        if lock.fd < 0:
            return
        cut_metrics(folder.metrics_file, 12)
        append_metrics(folder.metrics_file, {"iteration": 13, "loss": 4.0, "tokens": 1300})
        lock.release()

    monkeypatch.setattr("megaplug.commands.runs_follow.time.sleep", start_again)
    assert typed("action=follow", "run=small-3*") == 0
    steps = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert steps == [*range(7, 16), 15, *range(4, 14)]


def test_a_run_that_does_not_run_need_not_be_stopped(there, capsys):
    found = told(capsys, "action=stop", "run=small-1111aaaa")
    assert found["was_running"] is False and found["run"]["status"] == "finished"


def test_a_run_on_another_machine_is_not_stopped_from_here(there, capsys, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "node7")
        lock = RunLock.acquire(RunFolder(there / "runs" / "small-3333cccc"), "x")
    with lock:
        said = refused(capsys, "action=stop", "run=small-3333cccc")
    assert "runs on node7" in said and f"ssh node7 kill {os.getpid()}" in said


def test_a_process_that_has_the_launcher_s_number_alone_is_not_stopped(there, capsys):
    folder = RunFolder(there / "runs" / "small-3333cccc")
    lock = RunLock.acquire(folder, "x")
    # Its launcher is gone and its number somebody else's; a rank has the lock a little longer.
    with subprocess.Popen(["sleep", "60"]) as stranger:
        holder = json.loads(folder.lock_file.read_text()) | {"pid": stranger.pid}
        folder.lock_file.write_text(json.dumps(holder))
        with subprocess.Popen(["sleep", "0.5"], pass_fds=[lock.fd]):
            lock.release()
            found = told(capsys, "action=stop", "run=small-3333cccc")
        assert found["was_running"] is True and found["run"]["status"] == "killed"
        assert stranger.poll() is None
        stranger.kill()


def test_a_launcher_that_has_the_lock_is_stopped(there, capsys):
    script = (
        "import signal, sys; from pathlib import Path; from megaplug.runs.folder import RunFolder;"
        "from megaplug.runs.lock import RunLock; lock = RunLock.acquire(RunFolder(Path(sys.argv[1])), 'x');"
        "print(flush=True); signal.pause()"
    )
    words = [sys.executable, "-c", script, str(there / "runs" / "small-3333cccc")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as launcher:
        launcher.stdout.readline()
        assert told(capsys, "action=stop", "run=small-3333cccc")["run"]["status"] == "killed"
    assert launcher.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (None, "does not say which command"),
        ({"command": "rm -rf x"}, "does not say which command"),
        ({"command": "python launch/train.py 'name=x"}, "does not say which command"),
        ({"command": "python launch/train.py", "cwd": "/nowhere"}, "was started in /nowhere"),
    ],
)
def test_only_a_training_command_is_typed_again(event, said, there, capsys):
    folder = RunFolder(Path("runs/wide-4444dddd"))
    if event is not None:
        append_event(folder.events_file, {"event": "start", **event})
    assert said in refused(capsys, "action=resume", "run=wide-4444dddd")


@pytest.fixture
def begun(there: Path) -> RunFolder:
    """A run that its command has made a folder for, though there was one, and that was stopped."""
    make_run("try-5555eeee", "name=try", losses=(5.0,))
    folder = make_run("try-5555eeee-2", "name=try", losses=(5.0,), status="stopped")
    command = f"python {ROOT}/launch/train.py name=try resume=false 'lr.lr=1e-3'"
    append_event(folder.events_file, {"event": "start", "command": command, "cwd": str(there)})
    append_event(RunFolder(Path("runs/try-5555eeee")).events_file, {"event": "start", "command": command})
    return folder


def test_a_run_is_resumed_by_its_command_which_starts_nothing_over(begun, there, capsys, monkeypatch):
    typed_again = []
    monkeypatch.setattr(train, "main", lambda words: typed_again.append((words, Path.cwd())) or 3)
    (there / "elsewhere").mkdir()
    monkeypatch.chdir(there / "elsewhere")
    assert typed("action=resume", f"run={there / begun.path}") == 3
    assert typed_again == [(["name=try", "lr.lr=1e-3"], there)]
    assert capsys.readouterr().out == "try-5555eeee-2 is stopped at step 1\n"
    assert typed("action=resume", f"run={there / begun.path}", "output=json") == 3
    assert typed_again[1] == (["name=try", "lr.lr=1e-3", "launch.output=json"], there)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["event"], answer["exit_code"], answer["run"]["status"]) == ("answer", 3, "stopped")


def test_a_run_that_its_command_would_not_find_again_is_not_resumed(begun, there, capsys):
    said = refused(capsys, "action=resume", "run=try-5555eeee")
    assert f"would go on with {there / begun.path}" in said
    assert f"load={there}/runs/try-5555eeee load_state=all" in said
    begun.path.rename("elsewhere")
    assert "would go on with" in refused(capsys, "action=resume", "run=./elsewhere")


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (["action=lst"], "action=lst does not exist", "did you mean list?"),
        (["compare"], "'compare' is no key=value", "did you mean action=compare?"),
        (["runs/small"], "is no key=value", "run=runs/small"),
        (["run=smal-1111aaaa"], "there is no run 'smal-1111aaaa'", "did you mean small-1111aaaa?"),
        (["run=xyz"], "there is no run 'xyz'", "there are small-1111aaaa"),
        (["run=notes"], "neither job.yaml nor state.json", "small-1111aaaa"),
        (["runs_dir=none"], "runs_dir=none is not a folder", "launch/train.py"),
        (["runs_dir=runs/notes"], "holds no run", "launch/train.py"),
        (["action=stop"], "no run is named", "run=FOLDER"),
        (["action=stop", "run=small-*"], "names 3 runs", "name one"),
        (["action=compare", "run=wide-*"], "is the only run", "name several"),
        (["action=remove"], "nothing is deleted", "name one"),
        (["action=follow", "run=small-1*", "rank=x"], "rank=x is not the number", "rank=0"),
        (["picture=x.png"], "picture=... means nothing to action=list", "action=compare"),
        (["--cfg", "job"], "no job is composed here", "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_told_with_what_was_meant(there, capsys, words, said, hint):
    message = refused(capsys, *words)
    assert said in message and hint in message.partition("hint: ")[2]


@pytest.mark.parametrize("name", [*command.ACTIONS, *command.WORDS, "action"])
def test_help_explains_every_action_and_word(name, capsys):
    assert typed("--help", name) == 0
    said = capsys.readouterr().out
    assert said.startswith((f"action={name}", f"{name}=")) and len(said.splitlines()) >= 2


@pytest.mark.parametrize("words", [[], ["action=remove", "run=small-*"], ["--help"]])
def test_an_answer_needs_no_torch_and_comes_at_once(there, words):
    assert_quick("runs", words, there)


@pytest.mark.slow
def test_a_live_run_is_listed_followed_stopped_killed_and_resumed(tmp_path, capsys):
    write_corpus(tmp_path / "corpus")
    runs = tmp_path / "runs"
    words = [*SMALL, f"data.path={tmp_path / 'corpus'}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += [f"runs_dir={runs}", "train.iters=60", "checkpoint.save_interval=10"]
    here = f"runs_dir={runs}"
    live = Live(words)
    live.until_step(12)
    (run,) = told(capsys, here)["runs"]
    assert run["status"] == "running" and run["process"]["pid"] == live.process.pid
    follower = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "runs.py"), "action=follow", "run=small-*", here],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    found = told(capsys, "action=stop", "run=small-*", here)
    assert found["was_running"] is True and found["run"]["status"] == "stopped"
    assert live.end() == 128 + signal.SIGTERM
    followed, _ = follower.communicate(timeout=60)
    steps = [line for line in followed.splitlines() if line.startswith("step ")]
    stopped_at = found["run"]["iteration"]
    assert int(steps[-1].split()[1]) == stopped_at == found["run"]["saved_iteration"] >= 12
    assert "is stopped at step" in followed.splitlines()[-1]

    again = Live(words)
    again.until_step(stopped_at + 1)
    again.process.kill()
    again.process.wait()
    folder = RunFolder(next(iter(runs.iterdir())))
    await_nobody(folder)
    # A process lets go of its files a moment after it can be seen no more.
    wait_until_free(folder.lock_file)
    (run,) = told(capsys, here)["runs"]
    assert run["status"] == "killed"

    words = ["action=resume", "run=small-*", here, "output=json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "runs.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    header, *_, summary, resumed = map(json.loads, done.stdout.splitlines())
    assert header["resumes"] == f"from step {run['saved_iteration']:,}"
    assert [line["event"] for line in (header, summary, resumed)] == ["header", "summary", "answer"]
    (run,) = told(capsys, here)["runs"]
    assert (run["status"], run["iteration"]) == ("finished", 60)
