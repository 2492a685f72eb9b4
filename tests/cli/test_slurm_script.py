"""``launch=slurm launch.submit=false``: the batch script that is written, and what cannot break out of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from live_command import train
from small_jobs import SMALL, write_corpus

from megaplug.commands import frozen
from megaplug.commands import train as command
from megaplug.commands.run import End
from megaplug.job.freeze import read_frozen
from megaplug.job.schema import Job
from megaplug.runs.folder import RunFolder

NASTY = "$(touch pwned) `touch pwned`'; touch pwned; ' \" \\ $HOME {{words|}} #!&|<>\n*~"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    monkeypatch.setattr("sys.argv", ["launch/train.py"])
    return tmp_path


def written(*words: str) -> RunFolder:
    """The folder of a job whose script was written."""
    places = ["data.path=corpus", "data.cache_dir=cache", "launch.submit=false"]
    assert command.main([*SMALL, *places, "launch=slurm", *words]) == 0
    (found,) = Path("runs").glob("*/job.sbatch")
    return RunFolder(found.parent)


def ran(folder: RunFolder, srun: str = "exit 0", **environment: str) -> tuple[int, list[str], dict[str, str]]:
    """A run's script as `ran_script` runs it."""
    return ran_script(folder.batch_script, srun, **environment)


def ran_script(
    script: Path, srun: str = "exit 0", **environment: str
) -> tuple[int, list[str], dict[str, str]]:
    """The script run by bash with programs in place of SLURM's: exit code, srun's words and environment."""
    programs = Path("programs").absolute()
    programs.mkdir(exist_ok=True)
    record = 'printf "%s\\0" "$@" > "$RECORD/words"; env --null > "$RECORD/environment"'
    for name, lines in {
        "srun": f"{record}; {srun}",
        "scontrol": 'echo "$@" >> "$RECORD/scontrol"; echo n7',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (programs / name).chmod(0o755)
    there = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(Path.cwd()), "HOME": str(Path.cwd())}
    there |= {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[7-8]", **environment}
    done = subprocess.run(["bash", str(script)], env=there, capture_output=True, text=True)
    assert Path("words").exists(), done.stderr
    words = Path("words").read_text().split("\0")[:-1]
    pairs = (pair.split("=", 1) for pair in Path("environment").read_text().split("\0")[:-1])
    return done.returncode, words, dict(pairs)


def test_a_script_says_what_the_keys_of_slurm_say(there, capsys):
    folder = written(
        "topology.dp=4", "launch.nnodes=2", "slurm.partition=long", "slurm.account=team", "slurm.qos=high",
        "slurm.time=2-12:00:00", "slurm.cpus_per_task=8", "slurm.mem=100G", "slurm.exclusive=false",
        "slurm.options.constraint=h100", "slurm.options.hold=''", "slurm.signal_s=90", "slurm.requeue=false",
    )  # fmt: skip
    options = [line for line in folder.batch_script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert options == [
        f"#SBATCH --job-name={folder.name}",
        f'#SBATCH --output="{folder.path.resolve()}/slurm-%j.log"',
        "#SBATCH --open-mode=append",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --partition=long",
        "#SBATCH --account=team",
        "#SBATCH --qos=high",
        "#SBATCH --time=2-12:00:00",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=100G",
        "#SBATCH --signal=USR2@90",
        "#SBATCH --no-requeue",
        "#SBATCH --constraint=h100",
        "#SBATCH --hold",
    ]
    assert "2 x 2 ranks" in capsys.readouterr().out


def test_a_script_starts_the_frozen_job_at_the_first_node_by_a_port_of_its_own(there):
    folder = written("launch.nnodes=1")
    code, words, _ = ran(folder)
    assert code == 0
    program, *rest = words[words.index("--wait=60") + 1 :]
    assert Path(program).name.startswith("python")
    assert rest[1:] == [
        "--job", str(folder.job_file.resolve()), "launch=nodes", "launch.master_addr=n7",
        "launch.master_port=20123",
    ]  # fmt: skip


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
def test_no_value_breaks_out_of_the_script(there, container):
    """Each reaches its program as it was typed, and nothing in it is run."""
    quoted = "'" + NASTY.replace("'", "\\'") + "'"
    nasty = ("environment.NASTY", "python", "setup")
    keys = [f"slurm.{key}={quoted}" for key in nasty] + [
        f"alerts.command={quoted}",
        f"slurm.modules=[{quoted}]",
    ]
    if container != "none":
        keys += [f"slurm.container={container}", f"slurm.image={quoted}", f"slurm.mounts=[{quoted}]"]
    folder = written(*keys, f"launch.master_addr={quoted}")
    script = folder.batch_script.read_text()
    Path(NASTY).write_text("export WAS_READ=1\n")
    record = 'module() { printf "%s\\0" "$@" > modules; }'
    folder.batch_script.write_text(script.replace("set -eo pipefail", f"set -eo pipefail\n{record}"))
    _, words, environment = ran(folder)
    assert not Path("pwned").exists()
    assert environment["NASTY"] == NASTY and environment["WAS_READ"] == "1"
    assert NASTY in words and f"launch.master_addr={NASTY}" in words
    assert Path("modules").read_text().split("\0")[:-1] == ["load", NASTY]
    if container == "pyxis":
        assert f"--container-image={NASTY}" in words
    assert subprocess.run(["bash", "-n", folder.batch_script]).returncode == 0


@pytest.mark.parametrize("key", ["partition", "account", "qos", "gres", "mem", "options.constraint"])
@pytest.mark.parametrize("value", ["a b", "x\\n#SBATCH --wrap=x", '\\"x', "$HOME", "a;b"])
def test_what_an_sbatch_line_cannot_hold_is_refused(there, key, value, capsys):
    assert command.main([*SMALL, "launch=slurm", "launch.submit=false", f'slurm.{key}="{value}"']) == 2
    assert f"slurm.{key}" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("slurm.container=pyxis", "slurm.image=a.sqsh", "slurm.environment.A='$x y'"),
        (
            "slurm.container=apptainer",
            "slurm.image=a.sif",
            "slurm.setup=env.sh",
            "slurm.modules=[cuda/13,'a b']",
        ),
        ("slurm.requeue=false", "launch.master_addr=10.0.0.1", "launch.master_port=29400"),
    ],
)
def test_a_script_passes_shellcheck(there, words):
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck here (Debian: shellcheck)")
    folder = written(*words)
    done = subprocess.run(["shellcheck", folder.batch_script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_job_is_queued_again_where_its_launcher_asks_for_that_and_not_otherwise(there):
    folder = written()
    code, _, environment = ran(folder, srun='touch "$MEGAPLUG_REQUEUE"; exit 140')
    assert environment["MEGAPLUG_REQUEUE"] == f"{folder.path.resolve()}/requeue-123"
    assert code == 140 and "requeue 123" in Path("scontrol").read_text()
    assert not Path(environment["MEGAPLUG_REQUEUE"]).exists()
    Path("scontrol").unlink()
    # What an earlier start has left behind is no wish of this one.
    Path(environment["MEGAPLUG_REQUEUE"]).touch()
    assert ran(folder, srun="exit 1")[0] == 1
    assert "requeue" not in Path("scontrol").read_text()


def test_gpus_are_asked_for_as_many_as_a_node_has_ranks(there):
    folder = written("device=cuda", "topology.dp=4", "launch.nnodes=2")
    assert "#SBATCH --gres=gpu:2\n" in folder.batch_script.read_text()


def test_nodes_are_as_few_as_hold_the_ranks(there):
    folder = written(
        "device=cuda", "topology.dp=16", "train.global_batch_size=16", "cluster=h100", "slurm.gres=none"
    )
    script = folder.batch_script.read_text()
    assert "#SBATCH --nodes=2\n" in script and "--gres" not in script


def test_a_folder_whose_name_a_script_cannot_hold_is_refused(there, capsys):
    words = [*SMALL, "data.path=corpus", "data.cache_dir=cache", "launch.submit=false", "launch=slurm"]
    assert command.main([*words, "runs_dir='a\\\"b'"]) == 2
    assert "a batch script cannot name" in capsys.readouterr().err


def test_mistakes_about_slurm_are_said_all_at_once(there, capsys):
    words = [
        "slurm.time=soon",
        "slurm.image=a",
        "slurm.options.output=x",
        "slurm.options.X=y",
        "launch.node_rank=1",
    ]
    assert command.main([*SMALL[:-1], "launch=slurm", "launch.node_rank=1", *words]) == 2
    said = capsys.readouterr().err
    parts = (
        "is no time limit",
        "means nothing without a container",
        "stands in the script already",
        "is no option of sbatch",
        "device: what the nodes compute on",
        "is given by SLURM",
    )
    for part in parts:
        assert part in said


def test_a_frozen_job_takes_no_words_but_those_of_launch(there, capsys):
    folder = written()
    assert command.main(["--job", str(folder.job_file), "lr.lr=1"]) == 2
    assert "lr.lr is frozen in" in capsys.readouterr().err
    assert command.main(["--job", "nowhere.yaml"]) == 2
    assert "there is no file nowhere.yaml" in capsys.readouterr().err


def test_a_frozen_job_whose_data_has_changed_is_not_started(there, capsys):
    folder = written()
    Path("corpus/00.txt").write_text("other words than before")
    assert command.main(["--job", str(folder.job_file), "launch=local"]) == 2
    assert "would be another run now" in capsys.readouterr().err


def swept(*words: str) -> dict[str, Any]:
    """What is said, as JSON, of a sweep whose scripts were written."""
    places = ["data.path=corpus", "data.cache_dir=cache", "launch.submit=false", "launch.output=json"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        command.main([*SMALL, *places, "-m", "launch=slurm", *words])
    return dict(json.loads(said.getvalue().splitlines()[-1]))


def test_a_sweep_is_one_array_of_the_runs_that_are_left(there):
    said = swept("train.seed=1,2,3", "launch.at_once=2")
    (array,) = said["arrays"]
    script = Path(array["script"]).read_text()
    assert "#SBATCH --array=0-2%2\n" in script
    assert f'#SBATCH --output="{Path(said["folder"]).resolve()}/slurm-%A_%a.log"\n' in script
    frozen = [Path(point["run"]) for point in said["points"]]
    for task, folder in enumerate(frozen):
        program = ran_script(Path(array["script"]), SLURM_ARRAY_TASK_ID=str(task))[1]
        assert f"{folder.resolve()}/job.yaml" in program
        assert (folder / "job.yaml").is_file()


def test_runs_that_ask_for_other_nodes_are_arrays_of_their_own(there):
    said = swept("topology.dp=1,2", "train.seed=1,2", "device=cuda", "launch.nnodes=1")
    scripts = [Path(array["script"]) for array in said["arrays"]]
    assert [script.name for script in scripts] == ["array-1.sbatch", "array-2.sbatch"]
    assert [line for script in scripts for line in script.read_text().splitlines() if "--gres" in line] == [
        "#SBATCH --gres=gpu:1",
        "#SBATCH --gres=gpu:2",
    ]


def test_a_sweep_has_one_way_of_asking_slurm(there, capsys):
    assert command.main([*SMALL, "-m", "launch=slurm", "slurm.partition=a,b"]) == 2
    assert "slurm.partition is one for the whole sweep, and there are a and b" in capsys.readouterr().err


def test_the_script_of_an_array_passes_shellcheck(there):
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck here (Debian: shellcheck)")
    (array,) = swept("train.seed=1,2")["arrays"]
    done = subprocess.run(["shellcheck", array["script"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("key", "such"), [("environment", "NAME"), ("options", "constraint")])
def test_what_has_names_is_not_given_as_one_text(there, key, such, capsys):
    assert command.main([*SMALL, "launch=slurm", f"slurm.{key}=FOO"]) == 2
    assert f"such as slurm.{key}.{such}='FOO'" in capsys.readouterr().err


def test_a_sweep_is_not_one_job_of_several_nodes(there, capsys):
    words = ["launch=nodes", "launch.nnodes=1", "launch.node_rank=0", "launch.master_addr=127.0.0.1"]
    assert command.main([*SMALL, "-m", "train.seed=1,2", *words]) == 2
    assert "launch=nodes is one job on several machines" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_job_is_to_start_from_stays_what_it_was_when_it_was_submitted(there):
    """The other run goes on while this one waits in the queue."""
    places = ["data.path=corpus", "data.cache_dir=cache"]
    other = [*SMALL, *places, "name=other", "train.iters=20", "checkpoint.save_interval=5"]
    assert train(*other, "train.stop_at=5", cwd=there).returncode == 0
    (source,) = Path("runs").glob("other-*")
    folder = written("name=this", f"load={source}", "train.iters=2")
    assert train(*other, "train.stop_at=10", cwd=there).returncode == 0
    done = train("--job", str(folder.job_file), "launch=local", cwd=there)
    assert done.returncode == 0, done.stderr
    assert "the weights of" in done.stdout and "iter_0000005" in done.stdout
    assert read_frozen(folder.job_file).digest in folder.name


@pytest.mark.slow
def test_a_frozen_job_with_checkpoints_of_its_own_needs_no_more_what_it_began_with(there):
    places = ["data.path=corpus", "data.cache_dir=cache"]
    assert train(*SMALL, *places, "name=other", "train.iters=2", cwd=there).returncode == 0
    (source,) = Path("runs").glob("other-*")
    folder = written("name=this", f"load={source}", "train.iters=6", "train.stop_at=3")
    frozen = ("--job", str(folder.job_file), "launch=local")
    assert train(*frozen, cwd=there).returncode == 0
    shutil.rmtree(source)
    folder.job_file.write_text(folder.job_file.read_text().replace("stop_at: 3", "stop_at: null"))
    done = train(*frozen, cwd=there)
    assert done.returncode == 0 and "from step 3" in done.stdout, done.stderr
    # Without any it begins anew, and not from scratch.
    shutil.rmtree(folder.checkpoints)
    done = train(*frozen, cwd=there)
    assert done.returncode == 2 and "load" in done.stderr, done.stderr


def test_what_was_typed_of_launch_is_frozen_and_what_is_typed_beside_it_holds(there, monkeypatch):
    folder = written("launch.grace_s=33", "launch.join_s=44", "launch.nnodes=1")
    started: list[Job] = []

    def start(job: Job, *_: object) -> End:
        started.append(job)
        return End(0)

    monkeypatch.setattr(frozen, "start", start)
    typed = ["launch=nodes", "launch.join_s=55", "launch.nnodes=1", "launch.node_rank=0"]
    assert command.main(["--job", str(folder.job_file), *typed, "launch.master_addr=127.0.0.1"]) == 0
    (job,) = started
    launch = job.launch
    assert (launch.kind, launch.grace_s, launch.join_s, launch.node_rank) == ("nodes", 33.0, 55.0, 0)


def test_in_a_step_the_nodes_are_those_of_the_step(there, monkeypatch):
    """Whoever changes the number of nodes in the script has not changed the frozen job."""
    folder = written("topology.dp=2", "launch.nnodes=2")
    served: list[Job] = []
    monkeypatch.setattr(frozen, "serve", lambda job: served.append(job) or 0)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "4")
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert command.main(["--job", str(folder.job_file), "launch=nodes", "launch.master_addr=127.0.0.1"]) == 0
    assert (served[0].launch.nnodes, served[0].launch.node_rank) == (4, 3)


@pytest.mark.parametrize("flags", [["-m"], ["--cfg", "job"]])
def test_a_frozen_job_is_not_composed_again(there, flags, capsys):
    folder = written()
    assert command.main(["--job", str(folder.job_file), *flags]) == 2
    assert "--job starts one job" in capsys.readouterr().err


def test_how_many_gpus_a_node_has_is_not_guessed(there, capsys):
    assert (
        command.main([*SMALL[:-1], "device=cuda", "launch=slurm", "launch.submit=false", "topology.dp=8"])
        == 2
    )
    assert "how many GPUs a node has is not known" in capsys.readouterr().err


def test_a_chain_is_for_one_run(there, capsys):
    assert command.main([*SMALL, "-m", "launch=slurm", "train.seed=1,2", "slurm.chain=3"]) == 2
    assert "a sweep is an array" in capsys.readouterr().err
