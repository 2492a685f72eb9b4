"""What a person does wrong is told by the real command: one message, a hint, exit code 2, no rank started."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from live_command import train
from small_jobs import SMALL, SmallJobs

from megaplug.commands import resolved
from megaplug.commands.resolved import detect_machine
from megaplug.commands.train import main
from megaplug.job.freeze import read_frozen
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import write_manifest


@pytest.fixture
def words(small_jobs: SmallJobs, tmp_path: Path) -> list[str]:
    """A job that could run, with its runs below ``tmp_path``."""
    cache = f"data.cache_dir={small_jobs.root / 'cache'}"
    return [*SMALL, f"data.path={small_jobs.corpus}", cache, f"runs_dir={tmp_path / 'runs'}"]


def refused(words: Sequence[str], tmp_path: Path, **options: Path) -> str:
    """The one message of a command that has found a mistake before any rank started."""
    done = train(*words, **options)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count("error: ") == 1 and done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.glob("runs/*/logs/*")) and not list(tmp_path.glob("runs/*/state.json"))
    return done.stderr


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("train.itres=3", "train.iters"),
        ("model=llama3_8", "llama3_8b"),
        ("attention.name=flsh", "'flash'"),
        ("megatron.overlap_grad_reduc=true", "overlap_grad_reduce"),
        ("tokenizer.type=bytes", "did you mean byte"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_one_that_was_meant(
    word: str, meant: str, words: list[str], tmp_path: Path
) -> None:
    said = refused([*words, word], tmp_path)
    assert word.split("=")[0] in said
    assert meant in said.partition("hint: ")[2]


def test_mistakes_in_several_rooms_are_listed_at_once(words: list[str], tmp_path: Path) -> None:
    impossible = ["topology.tp=3", "topology.pp=3", "train.micro_batch_size=3"]
    said = refused(
        [*words, *impossible, "train.recompute_method=block", "megatron.num_layerz=2", "load_state=all"],
        tmp_path,
    )
    keys = ("topology.tp", "topology.pp", "train.recompute_method", "megatron.num_layerz", "load_state")
    assert all(f"- {key}: " in said for key in keys)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (None, b"", "does not exist"),
        ("corpus/", b"", "no file of a known kind"),
        ("corpus/picture.png", b"\x89PNG", "1 x .png"),
        ("corpus.txt", b"", "there is no text"),
        ("corpus.txt", b"word \xff\xfe", "not UTF-8"),
        ("corpus.jsonl", b"text\n", "corpus.jsonl:1 is not JSON"),
        ("corpus.jsonl", b'{"body": "text"}\n', "has no key 'text'"),
        ("corpus.txt", b"too short", "one sample needs seq_length + 1 = 65"),
    ],
)
def test_a_corpus_that_is_none(
    name: str | None, content: bytes, says: str, words: list[str], tmp_path: Path
) -> None:
    place = tmp_path / (name or "nowhere")
    if name is not None and name.endswith("/"):
        place.mkdir()
    elif name is not None:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    given = tmp_path / (name or "nowhere").partition("/")[0]
    assert says in refused([*words, f"data.path={given}"], tmp_path)


def test_a_job_of_a_gpu_cluster_whose_text_is_too_short_is_told_of_the_device_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resolved, "detect_machine", lambda: replace(detect_machine(), num_gpus=0))
    (tmp_path / "corpus.txt").write_text("too short")
    typed = ["experiment=long_fast", "model.vocab_size=null", "launch=print", f"data.path={tmp_path}"]
    typed.append(f"data.cache_dir={tmp_path / 'cache'}")
    assert main(typed) == 2
    said = capsys.readouterr().err
    assert "- device: there is no GPU here, and the job is for cluster=h100" in said
    assert said.index("- device: ") < said.index("one sample needs")
    assert main([*typed, "device=cpu"]) == 2
    assert "no GPU here" not in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_corpus_that_may_not_be_read(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text " * 1000)
    (tmp_path / "secret.txt").chmod(0)
    assert "Permission denied" in refused([*words, f"data.path={tmp_path / 'secret.txt'}"], tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), ("{", "is not JSON"), ("{}", "which token ends a text")],
)
def test_a_tokenizer_that_is_none(content: str | None, says: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    assert says in refused([*words, "tokenizer=huggingface", f"tokenizer.path={file}"], tmp_path)


def word_tokenizer(folder: Path, words: Sequence[str]) -> Path:
    """A Hugging Face tokenizer that knows some words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def other_run(small_jobs: SmallJobs, name: str, *more: str) -> RunFolder:
    """The folder of a run with a checkpoint at step 10 that is whole, though it holds no tensors."""
    folder, _ = small_jobs.freeze([f"name={name}", "train.iters=20", *more])
    frozen = read_frozen(folder.job_file)
    checkpoint = folder.checkpoints / "iter_0000010"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "weights").write_bytes(b"0")
    extra = {"iteration": 10, "model": frozen.model_fingerprint, "job": frozen.digest}
    write_manifest(checkpoint, extra)
    return folder


def test_a_checkpoint_of_another_model(small_jobs: SmallJobs, words: list[str], tmp_path: Path) -> None:
    other = other_run(small_jobs, "wider")
    said = refused([*words, f"load={other.path}", "model.hidden_size=32", "model.rotary_base=7"], tmp_path)
    assert "model.hidden_size is 64 there and 32 here" in said
    assert "model.rotary_base is 10000 there and 7 here" in said


def test_a_checkpoint_of_another_tokenizer(small_jobs: SmallJobs, words: list[str], tmp_path: Path) -> None:
    known = ["cat", "dog", "bird", "sees", "hears"]
    two = [word_tokenizer(tmp_path / name, chosen) for name, chosen in (("a", known), ("b", known[::-1]))]
    chosen = [["tokenizer=huggingface", f"tokenizer.path={folder}"] for folder in two]
    other = other_run(small_jobs, "wordly", *chosen[0])
    load = f"load={other.path}"
    assert "tokenizer" in refused([*words, load], tmp_path)
    # As many words with other numbers: nothing but their order differs.
    assert "the vocabulary of the tokenizer" in refused([*words, load, *chosen[1]], tmp_path)
    assert train(*words, load, *chosen[0], "launch=print").returncode == 0


def test_a_whole_state_that_megatron_cannot_reshard(
    small_jobs: SmallJobs, words: list[str], tmp_path: Path
) -> None:
    moe = ["moe=small", "moe.moe_ffn_hidden_size=64"]
    other = other_run(small_jobs, "gathered", *moe)
    spread = [*words, *moe, "topology.ep=2", "topology.dp=2", f"load={other.path}"]
    said = refused([*spread, "load_state=all"], tmp_path)
    assert "from ep=1 to ep=2" in said and "load_state=weights" in said
    assert train(*spread, "launch=print").returncode == 0


def test_a_checkpoint_that_is_not_whole(small_jobs: SmallJobs, words: list[str], tmp_path: Path) -> None:
    other = other_run(small_jobs, "torn")
    (other.checkpoints / "iter_0000010" / "weights").write_bytes(b"")
    load = f"load={other.checkpoints / 'iter_0000010'}"
    assert "0 bytes in place of 1" in refused([*words, load], tmp_path)


def test_what_load_passes_over_is_named(small_jobs: SmallJobs, words: list[str], tmp_path: Path) -> None:
    other = other_run(small_jobs, "half_torn")
    (other.checkpoints / "iter_0000020").mkdir(exist_ok=True)
    said = train(*words, f"load={other.path}", "launch=print")
    assert said.returncode == 0, said.stderr
    assert f"the weights of {other.checkpoints / 'iter_0000010'}" in said.stdout
    assert "step 20 is not whole: it has no manifest" in said.stdout


def test_a_port_in_use(words: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = refused([*words, f"launch.master_port={port}"], tmp_path)
    assert f"port {port} of 127.0.0.1 is in use" in said
    assert "launch.master_port" in said.partition("hint: ")[2]


def test_a_place_for_runs_that_is_a_file(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused([*words, f"runs_dir={tmp_path / 'file'}"], tmp_path)
    assert f"{tmp_path / 'file'}" in said and "runs_dir" in said


def test_a_name_that_is_no_folder_s_name(words: list[str], tmp_path: Path) -> None:
    assert "'a/b'" in refused([*words, "name=a/b"], tmp_path)
