"""``launch/train.py`` as a person types it, up to the point where ranks would start."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ("torch", "megatron", "numpy", "rich", "matplotlib", "tensorboard", "transformers", "psutil")


def train(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words for a few kilobytes of text, tokenized once."""
    place = tmp_path_factory.mktemp("text")
    (place / "text").mkdir()
    (place / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return [
        f"data.path={place / 'text'}",
        f"data.cache_dir={place / 'cache'}",
        "data.split='80,20,0'",
        "device=cpu",
        # Sizes that stay as they are when the shipped defaults are tuned.
        "model.num_layers=4",
        "model.hidden_size=64",
        "model.num_attention_heads=8",
        "model.num_query_groups=2",
        "train.micro_batch_size=4",
        "train.global_batch_size=16",
    ]


@pytest.fixture
def text_job(text: list[str], tmp_path: Path) -> list[str]:
    """Words for a job on that text, with its runs below ``tmp_path``."""
    return [*text, f"runs_dir={tmp_path / 'runs'}"]


def test_printing_the_configuration_takes_under_a_second() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = train("--cfg", "job", "model=llama3_8b", "topology=tp4_pp2")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        # The work itself; the clock on the wall also counts what else the machine does.
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 1.0
    config = yaml.safe_load(done.stdout)
    assert (config["model"]["num_layers"], config["topology"]["tp"]) == (32, 4)


def test_printing_the_configuration_imports_nothing_heavy() -> None:
    code = f"""
import sys
from megaplug.commands.train import main
code = main(["--cfg", "job"])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_references_are_resolved_when_asked() -> None:
    assert "name: ${model.name}" in train("--cfg", "job").stdout
    assert "name: ${model.name}" not in train("--cfg", "job", "--resolve").stdout


@pytest.mark.parametrize(
    "word", ["train.itres=3", "model=llama3_8", "topolgy=tp2", "topology.tp=two", "megatron.num_layerz=2"]
)
def test_a_mistake_is_one_message_with_exit_code_2(word: str) -> None:
    done = train(word)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert done.stdout == ""


def test_several_impossible_topology_values_are_listed_at_once() -> None:
    done = train("model.num_layers=4", "topology.tp=3", "topology.pp=3", "topology.ep=2")
    assert done.returncode == 2
    assert all(f"- {key}: " in done.stderr for key in ("topology.tp", "topology.pp", "topology.ep"))
    assert "nearest that fit" in done.stderr


def test_an_unknown_flag_names_the_flags() -> None:
    done = train("--cgf", "job")
    assert done.returncode == 2
    assert "--cfg job" in done.stderr


def test_a_reader_that_has_left_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_print_shows_job_ranks_and_megatron_s_arguments_and_makes_no_run(
    text_job: list[str], tmp_path: Path
) -> None:
    done = train(*text_job, "launch=print", "topology=tp2_pp2", "precision=bf16")
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 64" in done.stdout
    assert "tp groups: [0 1] [2 3]" in done.stdout
    assert "layers of the pipeline stages: 2 2" in done.stdout
    assert 'torchrun --nproc-per-node 4 "${PRETRAIN_GPT:-pretrain_gpt.py}"' in done.stdout
    assert "launch=freeze writes the job.yaml" in done.stdout
    assert "--tensor-model-parallel-size 2" in done.stdout and "--bf16" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["topology.dp=4"], False),
        (["model.num_layers=80", "model.hidden_size=8192", "model.ffn_hidden_size=28672"], True),
        (["model.num_layers=80", "model.hidden_size=8192", "cluster=h100", "topology=tp8"], False),
    ],
    ids=["small", "too large", "for another machine"],
)
def test_print_warns_of_a_job_that_this_machine_cannot_run(
    words: list[str], warned: bool, text_job: list[str]
) -> None:
    done = train(*text_job, "launch=print", *words)
    assert done.returncode == 0, done.stderr
    assert ("not on this machine" in done.stdout) == warned
    assert ("GB free of" in done.stdout) == warned
    said = json.loads(train(*text_job, "launch=print", "launch.output=json", *words).stdout)
    assert [found["key"] for found in said["not_on_this_machine"]] == ["topology.world_size"] * warned


def test_words_that_do_nothing_are_told_in_the_header(text_job: list[str]) -> None:
    done = train(*text_job, "launch=print", "topology.tp=1", "topology.tp=2", "moe.moe_router_topk=4")
    (note,) = (line for line in done.stdout.splitlines() if line.strip().startswith("note"))
    assert "the last holds, topology.tp=2" in note and "moe.moe_router_topk does nothing" in note


def test_freeze_writes_the_folder_from_which_a_run_or_plain_megatron_starts(
    text_job: list[str], tmp_path: Path
) -> None:
    done = train(*text_job, "launch=freeze", "topology=tp2")
    assert done.returncode == 0, done.stderr
    job_file, command_file = map(Path, done.stdout.split())
    assert job_file.parent.parent == tmp_path / "runs"
    assert f"export MEGAPLUG_JOB={job_file}\n" in command_file.read_text()
    assert not list(job_file.parent.glob("logs/*")) and not (job_file.parent / "state.json").exists()
    # The same words name the same folder, whether it is shown, frozen or started.
    shown = train(*text_job, "launch=print", "topology=tp2")
    assert f"# the run {job_file.parent}\n" in shown.stdout and "launch=freeze writes" not in shown.stdout
    (job_file.parent / "checkpoints" / "iter_0000002").mkdir()
    again = train(*text_job, "launch=freeze", "topology=tp2")
    assert again.stdout == done.stdout and done.stderr == ""
    # A damaged checkpoint is set aside here, too, and not without a word.
    assert "checkpoint 2 is not whole" in again.stderr and "STARTS FROM THE BEGINNING" in again.stderr


def test_print_as_json_is_one_object(text_job: list[str]) -> None:
    done = train(*text_job, "launch=print", "launch.output=json", "train.iters=null", "train.epochs=2")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["derived"]["iters"] >= 1
    assert "--train-iters" in content["megatron_args"]


def test_the_same_job_has_the_same_folder_and_another_has_another(text_job: list[str]) -> None:
    names = [
        json.loads(train(*text_job, "launch=print", "launch.output=json", *more).stdout)["run"]
        for more in ([], ["train.stop_at=5"], ["train.seed=5"])
    ]
    assert names[0] == names[1] != names[2]


def test_more_ranks_than_the_machine_holds_is_an_error_before_any_starts(
    text_job: list[str], tmp_path: Path
) -> None:
    done = train(*text_job, "topology.dp=4096", "train.global_batch_size=16384")
    assert done.returncode == 2
    assert "topology.world_size: 4096 ranks" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_print_shows_a_cluster_that_this_machine_is_not(text_job: list[str]) -> None:
    done = train(*text_job, "launch=print", "topology.dp=4096", "train.global_batch_size=16384")
    assert done.returncode == 0, done.stderr
    assert "... 4064 more ranks" in done.stdout


def test_a_tokenizer_that_does_not_fit_the_model_is_an_error(text_job: list[str]) -> None:
    done = train(*text_job, "model.vocab_size=200")
    assert done.returncode == 2
    assert "257" in done.stderr and "200" in done.stderr


def test_an_own_folder_of_configurations_composes_from_elsewhere(text_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text(
        "defaults:\n  - tiny\n  - _self_\nname: mine\nnum_layers: 6\n"
    )
    done = train("--config-dir", "own", "model=mine", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["num_layers"] == 6
