from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megaplug.data import build, cache
from megaplug.data import prepare as module
from megaplug.data.documents import read_documents
from megaplug.data.faults import Faults
from megaplug.data.prepare import prepare, too_small
from megaplug.data.sources import find_corpus
from megaplug.errors import UserError
from megaplug.job.facts import DataFacts
from megaplug.job.schema import TokenizerConfig


@pytest.fixture
def builds(monkeypatch):
    """How often an entry was built."""
    calls: list[str] = []
    real = module.build_entry

    def counted(folder: Path, *rest: object):
        calls.append(folder.name)
        return real(folder, *rest)

    monkeypatch.setattr(module, "build_entry", counted)
    return calls


def age(folder: Path, monkeypatch) -> None:
    """Lets the files look old enough for the shortcut, as those of a real corpus are."""
    monkeypatch.setattr(cache, "_TICK_NS", -(10**15))


def documents_of(facts: DataFacts) -> dict[str, list[list[int]]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return {
        split: [dataset[i].tolist() for i in range(len(dataset))]
        for split, prefix in facts.prefixes.items()
        for dataset in [IndexedDataset(prefix)]
    }


def test_what_megatron_reads_back_is_the_text_and_an_end_after_each_document(corpus_folder, make_job):
    job = make_job(corpus_folder, split="80,15,5")
    facts = prepare(job)
    wanted = Counter(d.text for d in read_documents(find_corpus(job.data.path), Faults()))
    assert wanted.total() == 20
    read = documents_of(facts)
    end_to_end = [i for split in ("train", "valid", "test") for doc in read[split] for i in doc]
    texts, current = [], []
    for i in end_to_end:
        if i == facts.eod:
            texts.append(bytes(current))
            current = []
        else:
            current.append(i)
    assert not current
    assert Counter(texts) == wanted
    total = len(end_to_end)
    assert facts.num_tokens == {
        "train": int(total * 0.8),
        "valid": int(total * 0.95) - int(total * 0.8),
        "test": total - int(total * 0.95),
    }
    assert facts.num_documents == {split: len(documents) for split, documents in read.items()}
    assert (facts.vocab_size, facts.eod) == (257, 256)
    order = [d.text for d in read_documents(find_corpus(job.data.path), Faults())]
    assert texts != order  # shuffled


def test_a_split_without_a_share_has_no_files(corpus_folder, make_job):
    facts = prepare(make_job(corpus_folder, split="1,0,0"))
    assert list(facts.prefixes) == ["train"]
    assert facts.num_tokens["valid"] == facts.num_tokens["test"] == 0
    assert facts.unigram_loss is None


def test_the_unigram_loss_is_the_cross_entropy_of_smoothed_counts(corpus_folder, make_job):
    facts = prepare(make_job(corpus_folder, split="70,30,0"))
    read = documents_of(facts)
    train = Counter(i for doc in read["train"] for i in doc)
    valid = [i for doc in read["valid"] for i in doc]
    losses = [-math.log((train[i] + 1) / (train.total() + facts.vocab_size)) for i in valid]
    assert facts.unigram_loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_facts_survive_plain_values(corpus_folder, make_job):
    facts = prepare(make_job(corpus_folder))
    assert DataFacts.from_dict(facts.to_dict()) == facts
    with pytest.raises(KeyError, match="surplus"):
        DataFacts.from_dict({**facts.to_dict(), "surplus": 1})


def test_a_second_start_builds_nothing_and_reads_no_text(corpus_folder, make_job, builds, monkeypatch):
    age(corpus_folder, monkeypatch)
    first = prepare(make_job(corpus_folder))

    def must_not(*_: object):
        raise AssertionError("the text is read again")

    monkeypatch.setattr(module, "digest_documents", must_not)
    assert prepare(make_job(corpus_folder)) == first
    assert len(builds) == 1


def test_another_split_of_unchanged_files_is_built_from_the_shortcut(
    corpus_folder, make_job, builds, monkeypatch
):
    age(corpus_folder, monkeypatch)
    first = prepare(make_job(corpus_folder))
    second = prepare(make_job(corpus_folder, split="50,50,0"))
    assert second.fingerprint != first.fingerprint
    assert prepare(make_job(corpus_folder, split="1,1")).fingerprint == second.fingerprint
    assert len(builds) == 2


def test_another_tokenizer_gives_other_data(corpus_folder, make_job, bpe_file, builds):
    job = make_job(corpus_folder)
    first = prepare(job)
    job.tokenizer = TokenizerConfig(type="huggingface", path=str(bpe_file))
    second = prepare(job)
    assert second.fingerprint != first.fingerprint
    assert second.num_tokens["train"] < first.num_tokens["train"]
    assert len(builds) == 2


def test_the_fingerprint_is_the_same_wherever_and_however_named_the_text_lies(
    tmp_path, corpus_folder, make_job, builds
):
    first = prepare(make_job(corpus_folder))
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus_folder, moved)
    (moved / "doc00.txt").rename(moved / "zzz.txt")
    assert prepare(make_job(moved)).fingerprint == first.fingerprint
    assert len(builds) == 1


def test_a_file_that_changed_within_its_size_and_time_is_noticed(
    corpus_folder, make_job, builds, monkeypatch
):
    age(corpus_folder, monkeypatch)
    first = prepare(make_job(corpus_folder))
    file = corpus_folder / "doc00.txt"
    before = file.stat()
    file.write_bytes(file.read_bytes().swapcase())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert prepare(make_job(corpus_folder)).fingerprint != first.fingerprint
    assert len(builds) == 2


def test_files_too_new_to_trust_their_times_are_read_again(corpus_folder, make_job, builds):
    prepare(make_job(corpus_folder))
    job = make_job(corpus_folder)
    assert not (Path(job.data.cache_dir) / "shortcuts").exists()
    prepare(job)
    assert len(builds) == 1


def test_a_shortcut_that_is_wrong_is_found_out_once(corpus_folder, make_job, monkeypatch):
    age(corpus_folder, monkeypatch)
    first = prepare(make_job(corpus_folder))
    (shortcut,) = (Path(make_job("").data.cache_dir) / "shortcuts").iterdir()
    kept = json.loads(shortcut.read_text())
    kept["known"]["content"] = "0" * 64
    shortcut.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(make_job(corpus_folder))
    assert prepare(make_job(corpus_folder)) == first


@pytest.mark.parametrize("before", [1, None])
def test_a_shortcut_of_another_format_is_not_taken(before, corpus_folder, make_job, monkeypatch):
    """Files that look unchanged are read again where other things are to be known of them."""
    age(corpus_folder, monkeypatch)
    prepare(make_job(corpus_folder))
    (shortcut,) = (Path(make_job("").data.cache_dir) / "shortcuts").iterdir()
    kept = json.loads(shortcut.read_text())
    kept["known"] = {"other": "things"}
    if before is None:
        kept.pop("format", None)
        shortcut.write_text(json.dumps(kept))
    else:
        shortcut.write_text(json.dumps(kept))
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    prepare(make_job(corpus_folder))


@pytest.mark.parametrize("harm", ["missing", "cut", "no entry"])
def test_a_damaged_entry_is_built_again_and_said(harm, corpus_folder, make_job, builds, capsys):
    first = prepare(make_job(corpus_folder))
    good = documents_of(first)
    file = Path(first.prefixes["train"] + ".bin")
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        os.truncate(file, 10)
    else:
        (file.parent / "entry.json").write_text("{")
    capsys.readouterr()
    assert prepare(make_job(corpus_folder)) == first
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "is damaged" in said[0]
    assert documents_of(first) == good
    assert len(builds) == 2
    assert not list(file.parent.parent.glob("building-*"))


def test_a_build_that_is_killed_leaves_nothing_that_is_used(corpus_folder, make_job, tmp_path, builds):
    script = (
        "import os, signal, sys\n"
        "from megaplug.data import build\n"
        "from megaplug.data.prepare import prepare\n"
        "from megaplug.job.schema import Job\n"
        "job = Job(); job.data.path, job.data.cache_dir = sys.argv[1:]\n"
        "def die(folder, *_):\n"
        "    (folder / 'train.bin').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "build._gather = die\n"
        "prepare(job)\n"
    )
    root = tmp_path / "cache"
    died = subprocess.run([sys.executable, "-c", script, str(corpus_folder), str(root)], check=False)
    assert died.returncode == -9
    assert len(list(root.glob("building-*/train.bin"))) == 1
    facts = prepare(make_job(corpus_folder))
    assert len(builds) == 1
    assert sum(len(doc) for doc in documents_of(facts)["train"]) == facts.num_tokens["train"]
    assert not list(root.glob("building-*"))


def test_a_second_job_waits_for_the_one_that_builds_and_takes_its_data(corpus_folder, make_job, tmp_path):
    script = (
        "import sys\n"
        "from megaplug.data import prepare as module\n"
        "from megaplug.data.prepare import prepare\n"
        "from megaplug.job.schema import Job\n"
        "job = Job(); job.data.path, job.data.cache_dir = sys.argv[1:]\n"
        "real = module.build_entry\n"
        "def build(*rest):\n"
        "    print('building', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    return real(*rest)\n"
        "module.build_entry = build\n"
        "print(prepare(job).fingerprint)\n"
    )
    command = [sys.executable, "-c", script, str(corpus_folder), str(tmp_path / "cache")]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    with start() as first:
        assert first.stdout.readline() == "building\n"
        with start() as second:
            assert "waiting" in second.stderr.readline()
            built, _ = first.communicate("go on\n")
            found, _ = second.communicate()
    assert first.returncode == second.returncode == 0
    assert found == built  # and the second never said that it builds


def test_text_that_changes_while_it_is_read_is_refused(corpus_folder, make_job, monkeypatch):
    real = module.digest_documents

    def then_change(*args: object):
        digests = real(*args)
        (corpus_folder / "doc00.txt").write_text("something else")
        return digests

    monkeypatch.setattr(module, "digest_documents", then_change)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(make_job(corpus_folder))


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "is full"), (errno.EACCES, "cannot be written")])
def test_a_disk_that_refuses_is_named_and_nothing_is_left(
    number, says, corpus_folder, make_job, monkeypatch, tmp_path
):
    def refuse(*_: object):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(build, "write_index", refuse)
    with pytest.raises(UserError, match=says) as error:
        prepare(make_job(corpus_folder))
    assert "data.cache_dir" in error.value.hint
    assert not list((tmp_path / "cache").glob("building-*"))


def test_a_cache_that_cannot_be_made_is_named(corpus_folder, make_job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        prepare(make_job(corpus_folder, cache_dir=str(tmp_path / "file" / "cache")))


def test_a_corpus_of_empty_files_is_refused(tmp_path, make_job):
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_text("")
    with pytest.raises(UserError, match="there is no text"):
        prepare(make_job(tmp_path / "void"))


def test_too_small_names_each_split_that_holds_no_sample(corpus_folder, make_job):
    facts = prepare(make_job(corpus_folder, split="90,10,0"))
    assert too_small(facts, facts.num_tokens["valid"] - 1) == []
    problems = too_small(facts, facts.num_tokens["valid"])
    assert [problem.message.split()[0] for problem in problems] == ["valid"]
    assert len(too_small(facts, 10**9)) == 2


def test_a_cached_start_imports_neither_numpy_nor_torch_nor_megatron(
    corpus_folder, make_job, builds, tmp_path, monkeypatch
):
    age(corpus_folder, monkeypatch)
    prepare(make_job(corpus_folder))
    script = (
        "import sys\n"
        "from megaplug.data.prepare import prepare\n"
        "from megaplug.job.schema import Job\n"
        "job = Job(); job.data.path, job.data.cache_dir = sys.argv[1:]\n"
        "prepare(job)\n"
        "print(sorted({'numpy', 'torch', 'megatron', 'rich', 'tokenizers'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script, str(corpus_folder), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
