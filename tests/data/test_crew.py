"""Many processes give what one gives, byte for byte, and leave nothing behind however they end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from small_texts import some_text

from megaplug.data import build, prepare, shards
from megaplug.data.crew import crew
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """Files of two forms that make some sixty parts."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2_000)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 2_000)
    monkeypatch.setattr(build, "_PART_IDS", 3_000)
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02}.txt").write_text(some_text(i))
    lines = [json.dumps({"text": some_text(i, words=20 + i)}) for i in range(300)]
    (root / "many.jsonl").write_text("\n".join(lines) + "\n")
    return root


def digest_of(path: Path, kind: str) -> dict[str, object]:
    shard = {"paths": [str(path)], "kind": kind, "start": 0, "stop": 0, "size": 0}
    return {"do": "digest", "shard": shard, "text_key": "text"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", ["byte", "huggingface"])
def test_any_number_of_processes_writes_the_same_bytes(
    kind, corpus, make_job, tmp_path, monkeypatch, bpe_file
):
    made = []
    for cores in (1, 2, 3):
        monkeypatch.setattr(prepare, "num_cores", lambda cores=cores: cores)
        job = make_job(corpus, cache_dir=str(tmp_path / f"cache{cores}"), split="80,15,5")
        if kind == "huggingface":
            job.tokenizer = TokenizerConfig(type="huggingface", path=str(bpe_file))
        facts = prepare.prepare(job)
        made.append(files_of(Path(facts.prefixes["train"]).parent))
    assert set(made[0]) == {f"{s}.{e}" for s in ("train", "valid", "test") for e in ("bin", "idx")} | {
        "entry.json"
    }
    assert made[0] == made[1] == made[2]


def test_results_come_in_the_order_of_the_tasks_though_parts_differ_in_size(tmp_path):
    sizes = [200_000, 1, 5, 90_000, 3, 2, 1, 60_000, 4, 7] * 3
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * size)
    tasks = [digest_of(tmp_path / f"{number}.txt", "text") for number in range(len(sizes))]
    told: list[int] = []
    answers = []
    for size in (1, 3):
        with crew(size, TokenizerConfig()) as workers:
            answers.append(list(workers.results(tasks, told.append)))
    assert answers[0] == answers[1]
    assert sum(told) == 2 * sum(sizes)


def test_a_mistake_that_a_child_finds_is_the_users(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    task = digest_of(tmp_path / "a.jsonl.gz", "lines")
    with (
        crew(2, TokenizerConfig()) as workers,
        pytest.raises(UserError, match="decompressed") as error,
    ):
        list(workers.results([task], lambda _: None))
    assert error.value.hint


def test_a_child_that_fails_shows_why(tmp_path):
    with crew(2, TokenizerConfig()) as workers, pytest.raises(RuntimeError, match="KeyError: 'no such task'"):
        list(workers.results([{"do": "no such task"}], lambda _: None))


@pytest.fixture
def wordpiece(tmp_path) -> Path:
    """A tokenizer that knows two words, and raises on any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece({"known": 0, "words": 1, "</s>": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("form", ["text", "lines"])
@pytest.mark.parametrize("cores", [1, 2])
def test_a_document_that_the_tokenizer_raises_on_is_shown(
    cores, form, wordpiece, make_job, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "num_cores", lambda: cores)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 10)
    root = tmp_path / "few"
    root.mkdir()
    documents = ["known words"] * 5 + ["unheard of " + "x" * 100] + ["known"] * 5
    for number, text in enumerate(documents):
        if form == "text":
            (root / f"{number:02}.txt").write_text(text)
    if form == "lines":
        (root / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    job = make_job(root)
    job.tokenizer = TokenizerConfig(type="huggingface", path=str(wordpiece), eod="</s>")
    with pytest.raises(UserError) as error:
        prepare.prepare(job)
    file = "05.txt" if form == "text" else "all.jsonl"
    assert f"{file}, 111 bytes that begin with 'unheard of {'x' * 29}'" in error.value.message
    assert "Missing [UNK] token" in error.value.message


def test_children_end_when_one_of_them_cannot_be_started(monkeypatch):
    real, started = subprocess.Popen, []

    def refuse_third(*args: object, **more: object):
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(real(*args, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", refuse_third)
    with (
        pytest.raises(UserError, match="process 3 that tokenizes cannot be started: Resource temp"),
        crew(4, TokenizerConfig()),
    ):
        pass
    assert [child.returncode for child in started] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("path", [None, ""])
def test_files_where_one_stands_are_no_modules_of_the_children(
    path, corpus, make_job, tmp_path, monkeypatch, bpe_file
):
    for name in ("queue", "json", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", *filter(None, sys.path)]))
    monkeypatch.setattr(prepare, "num_cores", lambda: 2)
    job = make_job(corpus)
    job.tokenizer = TokenizerConfig(type="huggingface", path=str(bpe_file))
    assert prepare.prepare(job).num_documents["train"] > 300


SCRIPT = """
import sys
from megaplug.data import prepare, shards
from megaplug.job.schema import Job
prepare.num_cores = lambda: 2
shards.SHARD_BYTES = prepare.SHARD_BYTES = 200_000
job = Job()
job.data.path, job.data.cache_dir = sys.argv[1:]
prepare.prepare(job)
"""


@pytest.fixture
def large(tmp_path) -> Path:
    """Text that takes some seconds."""
    line = json.dumps({"text": some_text(1, words=2_000)}) + "\n"
    with (tmp_path / "large.jsonl").open("w") as stream:
        for number in range(3_000):
            stream.write(line.replace("the ring", f"the ring {number}", 1))
    return tmp_path / "large.jsonl"


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(folder.name))
    return found


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_build_that_is_ended_leaves_no_process_and_nothing_half(sign, large, tmp_path, make_job):
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", SCRIPT, str(large), str(cache)]
    started = subprocess.Popen(command, stderr=subprocess.PIPE)
    with started:
        until(lambda: any(file.stat().st_size > 0 for file in cache.glob("building-*/raw-*")))
        children = children_of(started.pid)
        assert len(children) == 2
        os.kill(started.pid, sign)
        started.wait()
        until(lambda: not any(map(is_alive, children)))
    assert started.returncode != 0
    assert not [folder for folder in cache.iterdir() if (folder / "entry.json").exists()]
    if sign == signal.SIGINT:
        assert not list(cache.glob("building-*"))
    if sign != signal.SIGKILL:
        return
    # What a killed one has left goes with the next, which is whole.
    facts = prepare.prepare(make_job(large))
    assert facts.num_documents["train"] + facts.num_documents["valid"] >= 3_000
    assert not list(cache.glob("building-*"))


BUSY = """
import json, sys
from megaplug.data.crew import crew
from megaplug.job.schema import TokenizerConfig
with crew(2, TokenizerConfig()) as workers:
    list(workers.results(json.loads(sys.argv[1]), lambda _: None))
"""


def test_children_that_neither_read_nor_write_end_with_a_parent_that_is_killed(tmp_path):
    """Each waits for text from a pipe that nobody writes to, so it sees no end of its tasks."""
    pipes = [tmp_path / f"{number}.txt" for number in range(2)]
    for pipe in pipes:
        os.mkfifo(pipe)
    tasks = json.dumps([digest_of(pipe, "text") for pipe in pipes])
    started = subprocess.Popen([sys.executable, "-c", BUSY, tasks], stderr=subprocess.PIPE)
    with started, ExitStack() as opened:
        for pipe in pipes:
            until(lambda pipe=pipe: is_read(pipe, opened))
        children = children_of(started.pid)
        assert len(children) == 2
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        until(lambda: not any(map(is_alive, children)))


def is_read(pipe: Path, opened: ExitStack) -> bool:
    """Whether a process reads from a named pipe; it is then kept open for writing."""
    try:
        opened.callback(os.close, os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


def test_a_disk_that_is_full_in_a_child_is_named_and_nothing_is_left(large, tmp_path):
    """A limit on the size of files stands for a full disk: the same call fails, with another number."""
    script = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
    )
    caught = (
        "from megaplug.errors import UserError\n"
        "try:\n    prepare.prepare(job)\n"
        "except UserError as error:\n    print(error)\n"
    )
    whole = script + SCRIPT.replace("prepare.prepare(job)\n", caught)
    command = [sys.executable, "-c", whole, str(large), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "data.cache_dir: " in done.stdout and "cannot be written: [Errno 27] File too large" in done.stdout
    assert not list((tmp_path / "cache").glob("building-*"))


@pytest.mark.parametrize("cores", [1, 2])
def test_a_tokenizer_that_changes_while_the_text_is_read_is_refused(
    cores, corpus, make_job, tmp_path, monkeypatch, bpe_file
):
    """It is loaded for the fingerprint first, and again where the text is encoded."""
    monkeypatch.setattr(prepare, "num_cores", lambda: cores)
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(bpe_file, mine / "tokenizer.json")
    job = make_job(corpus)
    job.tokenizer = TokenizerConfig(type="huggingface", path=str(mine))
    real = prepare.digest_documents

    def then_change(*args: object):
        digests = real(*args)
        content = json.loads((mine / "tokenizer.json").read_text())
        content["model"]["merges"].pop()
        (mine / "tokenizer.json").write_text(json.dumps(content))
        return digests

    monkeypatch.setattr(prepare, "digest_documents", then_change)
    with pytest.raises(UserError, match=r"tokenizer\.path: .*mine changed while the text was read"):
        prepare.prepare(job)
    assert not list(Path(job.data.cache_dir).glob("*/entry.json"))
