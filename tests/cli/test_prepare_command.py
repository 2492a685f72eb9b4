"""`launch/prepare.py` as a person types it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_jobs import SMALL, write_corpus
from small_tokenizers import write_sentencepiece, write_tiktoken

from megaplug.commands import prepare
from megaplug.data.indexed import read_indexed, write_index
from megaplug.data.tokenizers import load_tokenizer
from megaplug.job.schema import TokenizerConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus(tmp_path / "corpus")
    return ["data=text", f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}"]


def asked(capsys, *words: str) -> str:
    code = prepare.main(list(words))
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "Traceback" not in said.err
    return said.out


def answer(capsys, *words: str) -> dict:
    return json.loads(asked(capsys, *words, "output=json"))


def refused(capsys, *words: str) -> str:
    code = prepare.main(list(words))
    said = capsys.readouterr()
    assert code == 2, said.out
    assert said.out == ""
    return said.err


def test_text_is_prepared_and_the_answer_says_what_megatron_needs(words, capsys, tmp_path):
    told = answer(capsys, *words, "data.split='70,30,0'")
    text = "".join(file.read_text() for file in sorted((tmp_path / "corpus").iterdir()))
    sizes = {one["split"]: one["num_tokens"] for one in told["sets"]}
    assert sum(sizes.values()) == len(text.encode()) + 20  # an end after each document
    assert sizes["train"] == int(0.7 * sum(sizes.values()))
    for one in told["sets"]:
        assert read_indexed(Path(one["prefix"])).num_tokens == one["num_tokens"]
        assert one["num_bytes"] == sum(Path(f"{one['prefix']}.{e}").stat().st_size for e in ("bin", "idx"))
    train, valid = (one["prefix"] for one in told["sets"])
    assert told["megatron_args"][:4] == ["--train-data-path", train, "--valid-data-path", valid]
    assert told["megatron_args"][4:6] == ["--tokenizer-type", "NullTokenizer"]
    shown = asked(capsys, "action=prepare", *words, "data.split='70,30,0'")
    assert f"{sizes['train']:,}" in shown and train in shown and "257 ids, 256 ends a document" in shown


def test_named_pairs_are_those_of_the_cache(words, capsys, tmp_path):
    told = answer(capsys, *words, "out=sets/mine")
    assert sorted(file.name for file in (tmp_path / "sets").iterdir()) == [
        *("mine-train.bin", "mine-train.idx", "mine-valid.bin", "mine-valid.idx")
    ]
    cached = answer(capsys, *words)
    for one, kept in zip(told["sets"], cached["sets"], strict=True):
        assert one["prefix"] == str(tmp_path / "sets" / f"mine-{one['split']}")
        for ending in ("bin", "idx"):
            assert (
                Path(f"{one['prefix']}.{ending}").read_bytes()
                == Path(f"{kept['prefix']}.{ending}").read_bytes()
            )
    assert told["megatron_args"][1] == str(tmp_path / "sets" / "mine-train")


@pytest.mark.parametrize("key", ["data.path", "data.valid_path"])
def test_named_pairs_are_not_put_where_the_next_start_would_read_them(key, words, capsys, tmp_path):
    (tmp_path / "corpus" / "deep").mkdir()
    (tmp_path / "corpus" / "deep" / "more.txt").write_text("more " * 100)
    (tmp_path / "alone.txt").write_text("alone " * 1000)
    typed = [*words, "data.path=alone.txt", f"{key}=corpus"]
    for place in ("corpus/mine", "corpus/deep/new/mine"):
        message = refused(capsys, *typed, f"out={place}")
        assert "lies in corpus, a source" in message and "choose another place" in message
    assert not (tmp_path / "cache").exists()
    before = [one["num_tokens"] for one in answer(capsys, *typed)["sets"]]
    for place in ("corpus/.hidden/mine", "corpus/.mine", "mine"):
        asked(capsys, *typed, f"out={place}")
    assert [one["num_tokens"] for one in answer(capsys, *typed)["sets"]] == before


def test_named_pairs_are_overwritten_only_when_told(words, capsys, tmp_path):
    asked(capsys, *words, "out=mine")
    (tmp_path / "mine-valid.idx").write_bytes(b"precious")
    message = refused(capsys, *words, "out=mine")
    assert "mine-train.bin and 3 more is there already" in message and "overwrite=true" in message
    assert (tmp_path / "mine-valid.idx").read_bytes() == b"precious"
    asked(capsys, *words, "out=mine", "overwrite=true")
    assert read_indexed(tmp_path / "mine-valid").num_tokens > 0


def test_each_part_of_a_blend_gets_its_name(words, capsys, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else entirely. " * 500)
    blend = f"data.path={{mine:{{path:{tmp_path / 'corpus'},weight:3}},other:{{path:{other},weight:1}}}}"
    told = answer(capsys, *words, blend, "out=both", "data.split='1'")
    assert [(one["source"], one["weight"]) for one in told["sets"]] == [("mine", 0.75), ("other", 0.25)]
    path = told["megatron_args"][:5]
    assert path == [
        "--train-data-path",
        "0.75",
        f"{tmp_path}/both-train-mine",
        "0.25",
        f"{tmp_path}/both-train-other",
    ]


def test_a_look_at_what_a_job_reads(words, capsys, tmp_path):
    told = answer(capsys, *words, "action=inspect", "picture=lengths.png")
    prepared = answer(capsys, *words)
    assert {label: one["num_tokens"] for label, one in told["sets"].items()} == {
        one["split"]: one["num_tokens"] for one in prepared["sets"]
    }
    train = told["sets"]["train"]
    tokens = read_indexed(Path(train["prefix"]))
    assert train["lengths"]["median"] == np.median(tokens.lengths)
    assert sum(number for *_, number in train["histogram"]) == train["num_documents"] == tokens.num_documents
    assert train["sample"].startswith(bytes(tokens.document(0)[:50].tolist()).decode())
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    shown = asked(capsys, *words, "action=inspect")
    assert train["sample"][:60] in shown and "####" in shown and "bytes of text a token" in shown


def test_a_look_at_any_pair_with_and_without_its_tokenizer(words, capsys, tmp_path):
    asked(capsys, *words, "out=mine")
    blind = answer(capsys, "action=inspect", "prefix=mine-train.bin")["sets"]["mine-train"]
    assert blind["sample"] is None and blind["largest_id"] == 256
    seen = answer(capsys, "action=inspect", "prefix=mine-train", "tokenizer=byte")["sets"]["mine-train"]
    assert seen["sample"] and seen["num_ends"] > 0
    assert {key for key in seen if seen[key] != blind[key]} == {
        *("vocab_size", "num_ends", "bytes_per_token", "sample")
    }
    assert "tokenizer=... tokenizer.path=... shows its text" in asked(
        capsys, "action=inspect", "prefix=mine-train"
    )


def test_a_tokenizer_of_ones_own_is_trained_and_taken(words, capsys, tmp_path):
    told = answer(capsys, *words, "action=train_tokenizer", "vocab_size=290", "out=mine")
    assert (told["vocab_size"], told["eod"], told["num_documents"]) == (290, "<|endoftext|>", 20)
    tokenizer = load_tokenizer(TokenizerConfig(type="huggingface", path=str(tmp_path / "mine")))
    assert tokenizer.vocab_size == 290
    taken = ["tokenizer=huggingface", "tokenizer.path=mine"]
    found = answer(capsys, *words, *taken, "action=inspect")["sets"]["train"]
    assert found["vocab_size"] == 290 and found["largest_id"] < 290
    assert found["bytes_per_token"] > 2
    shown = asked(capsys, *words, "action=train_tokenizer", "vocab_size=9_000", "out=more")
    assert "9,000 were asked for" in shown
    assert "tokenizer=huggingface" in shown and "action=" not in shown and "vocab_size=" not in shown


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["action=preprae"], "did you mean prepare?"),
        (["output=jsno"], "did you mean json?"),
        (["overwrite=yes"], "overwrite=yes does not exist"),
        (["vocab_sise=300"], "did you mean vocab_size?"),
        (["data.pth=x"], "did you mean data.path?"),
        (["tokeniser=byte"], "did you mean tokenizer?"),
        (["vocab_size=300"], "vocab_size= means nothing with action=prepare"),
        (["action=inspect", "out=x"], "out= means nothing with action=inspect"),
        (["out="], "out= has no value"),
        (["data.path=nowhere"], "nowhere does not exist"),
        (["data.path=''", "out=x"], "data.path: it is empty"),
        (["data.split='0,1,0'"], "data.split"),
        (["tokenizer=sentencepiece"], "tokenizer.path: is not given"),
        (["tokenizer=tiktoken", "tokenizer.path=nowhere"], "nowhere does not exist"),
        (["action=inspect", "prefix=nowhere"], "data=text means nothing with prefix="),
        (["action=inspect", "picture=x.gif"], "picture: x.gif ends in '.gif'"),
        (["action=train_tokenizer", "vocab_size=300"], "out= is not given"),
        (["action=train_tokenizer", "out=x"], "vocab_size= is not given"),
        (["action=train_tokenizer", "out=x", "vocab_size=many"], "'many' is not a whole number"),
        *(
            (["action=train_tokenizer", "out=x", f"vocab_size={size}"], f"'{size}' is not a whole number")
            for size in ("_300", "8__192", "300_", "-300", "3e3")
        ),
        (["action=train_tokenizer", "out=x", "vocab_size=9"], "9 is below 257"),
        (["action=train_tokenizer", "out=x", "vocab_size=9_999_999_999"], "is not below 2,147,483,648"),
        (["action=train_tokenizer", "out=x", f"vocab_size={'9' * 5000}"], "is not below 2,147,483,648"),
        (["action=train_tokenizer", "out=x", "vocab_size=300", "tokenizer.path=y"], "leave tokenizer away"),
        (["action=train_tokenizer", "out=corpus", "vocab_size=300"], "corpus is there already"),
        (["--cfg", "job"], "are flags of launch/train.py"),
    ],
)
def test_a_mistake_is_one_message(typed, says, words, capsys, tmp_path):
    message = refused(capsys, *words, *typed)
    assert says in message
    assert "Traceback" not in message
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["corpus"]


def test_help_and_json_start_without_torch(words, tmp_path):
    script = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "prepare.py")]
    for typed in (["--help"], [*words, "output=json"]):
        done = subprocess.run([*script, *typed], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert " torch\n" not in done.stderr and " transformers\n" not in done.stderr
    assert json.loads(done.stdout)["action"] == "prepare"


def test_a_picture_cannot_be_written_where_there_is_no_folder(words, capsys, monkeypatch):
    assert "cannot write" in refused(capsys, *words, "action=inspect", "picture=no/folder/x.png")
    monkeypatch.setattr("os.fsync", full_disk)
    message = refused(capsys, *words, "action=inspect", "picture=x.png")
    assert "x.png" in message and "picture=" in message and "runs_dir" not in message


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_picture_of_another_ending_is_refused_before_anything_is_prepared(words, capsys, tmp_path):
    assert "ends in '.gif'" in refused(capsys, *words, "action=inspect", "picture=x.gif")
    assert not (tmp_path / "cache").exists()


def test_a_pair_without_documents_is_looked_at_and_has_no_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.bin").touch()
    write_index(tmp_path / "empty.idx", "uint16", np.zeros(0, dtype=np.int64))
    assert answer(capsys, "action=inspect", "prefix=empty")["sets"]["empty"]["num_documents"] == 0
    assert "0" in asked(capsys, "action=inspect", "prefix=empty")
    message = refused(capsys, "action=inspect", "prefix=empty", "picture=x.png")
    assert "there is no document in" in message and not (tmp_path / "x.png").exists()


def test_a_pair_that_is_not_there_is_named(capsys):
    assert "prefix: " in refused(capsys, "action=inspect", "prefix=nowhere")


@pytest.mark.parametrize(
    ("number", "by"),
    [(signal.SIGINT, ""), (signal.SIGTERM, " by SIGTERM"), (signal.SIGUSR2, " by SIGUSR2")],
    ids=["Ctrl-C", "SIGTERM", "SIGUSR2"],
)
def test_a_signal_ends_the_training_of_a_tokenizer_and_leaves_nothing(tmp_path, number, by):
    (tmp_path / "corpus").mkdir()
    # Long words of chance: to merge them takes much longer than this test waits.
    chance = np.random.default_rng(0)
    for place in range(20):
        letters = "".join(map(chr, chance.integers(97, 123, 60_000)))
        (tmp_path / "corpus" / f"{place}.txt").write_text(letters)
    command = [
        sys.executable,
        str(ROOT / "launch" / "prepare.py"),
        "action=train_tokenizer",
        "vocab_size=30000",
    ]
    command += ["out=mine", "data=text", "data.path=corpus"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stderr is not None
        try:
            line = child.stderr.readline()
            os.killpg(child.pid, number)  # as SLURM sends it: to its helpers, too
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert "merging" in line
    assert child.returncode == 128 + number, said
    assert f"interrupted{by}\n" in said and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["trained", pytest.param("sentencepiece", marks=pytest.mark.soak), "tiktoken"]
)
def test_tokenizers_of_every_kind_train_a_model(kind, words, capsys, tmp_path):
    texts = [file.read_text() for file in sorted((tmp_path / "corpus").iterdir())]
    if kind == "trained":
        asked(capsys, *words, "action=train_tokenizer", "vocab_size=280", "out=mine")
        chosen, size = ["tokenizer=huggingface", "tokenizer.path=mine"], 280
    elif kind == "sentencepiece":
        write_sentencepiece(tmp_path / "mine.model", texts)
        chosen, size = ["tokenizer=sentencepiece", "tokenizer.path=mine.model"], 300
    else:
        write_tiktoken(tmp_path / "mine.tiktoken")
        chosen, size = ["tokenizer=tiktoken", "tokenizer.path=mine.tiktoken"], 269
    told = answer(capsys, *words, *chosen)
    assert told["vocab_size"] == size
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *SMALL, *words, *chosen, "train.iters=30"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > losses[-1] + 0.5
    assert losses[0] == pytest.approx(np.log(size), abs=0.4)


def test_text_of_others_does_not_reach_the_terminal_as_it_is(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("a\x1b[31mred\tb\n" * 50)
    words = ["data=text", f"data.path={tmp_path / 'x.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]
    shown = asked(capsys, "action=inspect", *words, "data.split='1'")
    assert "a\ufffd[31mred" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("action=", {"action=prepare", "action=inspect", "action=train_tokenizer"}),
        ("vocab_s", {"vocab_size="}),
        ("data=te", {"data=text"}),
    ],
)
def test_a_shell_proposes_its_words_and_those_of_a_job(typed, proposed, capsys):
    assert proposed <= set(asked(capsys, "--complete", typed).split())
