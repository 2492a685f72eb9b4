"""Several sources: their weights, their names, splits of their own, and what they are called in the cache."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_texts import some_text

from megaplug.data.delivery import deliver, targets
from megaplug.data.prepare import prepare, too_small
from megaplug.errors import UserError
from megaplug.job.facts import DataFacts
from megaplug.job.schema import DataConfig
from megaplug.job.sources import source_problems, sources


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    for name, numbers in (("books", range(20)), ("code", range(20, 30))):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i}.txt").write_text(some_text(i, words=80))
    return tmp_path / "books", tmp_path / "code"


def ids_of(prefix: str) -> list[int]:
    return np.fromfile(f"{prefix}.bin", dtype=np.uint16).tolist()


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: [f"{a}:7", f"{b}:3"],
        lambda a, b: {"books": f"{a}:0.7", "code": f"{b}:.3"},
        lambda a, b: {"books": {"path": str(a), "weight": 0.7}, "code": {"path": str(b), "weight": 0.3}},
    ],
)
def test_weights_have_three_forms_that_mean_the_same(form, places, make_job):
    job = make_job("")
    job.data.path = form(*places)
    facts = prepare(job)
    for split in ("train", "valid"):
        assert [(part.name, part.weight) for part in facts.parts(split)] == [("books", 0.7), ("code", 0.3)]
    assert facts.data_path("train")[::2] == ["0.7", "0.3"]
    assert facts.parts("test") == [] and facts.prefixes == {}
    assert facts.source == "books 70.0%, code 30.0%"
    assert DataFacts.from_dict(facts.to_dict()) == facts


def test_without_weights_each_counts_by_its_tokens(places, make_job):
    job = make_job("")
    job.data.path = [str(place) for place in places]
    parts = prepare(job).parts("train")
    total = sum(part.num_tokens for part in parts)
    assert [part.weight for part in parts] == pytest.approx([part.num_tokens / total for part in parts])


def test_other_weights_are_another_data_set_but_tokenize_nothing_anew(places, make_job, monkeypatch):
    first, second = make_job(""), make_job("")
    first.data.path = [f"{places[0]}:7", f"{places[1]}:3"]
    second.data.path = [f"{places[0]}:6", f"{places[1]}:4"]
    facts = prepare(first)
    monkeypatch.setattr("megaplug.data.prepare.build_entry", None)
    other = prepare(second)
    assert other.fingerprint != facts.fingerprint
    assert [part.prefix for part in other.parts("train")] == [part.prefix for part in facts.parts("train")]
    second.data.path = {
        "a": f"{places[0]}:0.70",
        "b": f"{places[1]}:0.30",
    }  # names do not count, nor how it is written
    assert prepare(second).fingerprint == facts.fingerprint


def test_splits_may_have_sources_of_their_own(places, make_job):
    job = make_job(places[0], valid_path=[f"{places[0]}:1", f"{places[1]}:1"], test_path=str(places[1]))
    facts = prepare(job)
    alone = prepare(make_job(places[0], split="1"))
    assert facts.prefixes["train"] == alone.prefixes["train"]
    assert facts.prefixes["test"] == prepare(make_job(places[1], split="1")).prefixes["train"]
    assert [(part.name, part.weight) for part in facts.parts("valid")] == [("books", 0.5), ("code", 0.5)]
    assert facts.num_documents == {"train": 20, "valid": 30, "test": 10}


def test_the_unigram_loss_of_a_blend_is_that_of_the_mixture(places, make_job):
    job = make_job("", split="70,30,0")
    job.data.path = [f"{places[0]}:3", f"{places[1]}:1"]
    facts = prepare(job)
    train, valid = Counter(), Counter()
    for counter, split in ((train, "train"), (valid, "valid")):
        total = facts.num_tokens[split]
        for part, weight in zip(facts.parts(split), (0.75, 0.25), strict=True):
            ids = ids_of(part.prefix)
            for i in ids:
                counter[i] += weight / len(ids) * total
    size = facts.num_tokens["train"] + facts.vocab_size
    loss = -sum(count * math.log((train[i] + 1) / size) for i, count in valid.items()) / valid.total()
    assert facts.unigram_loss == pytest.approx(loss, rel=1e-9)
    assert prepare(job).unigram_loss == facts.unigram_loss


def test_a_part_without_one_sample_is_named(places, make_job):
    job = make_job("")
    job.data.path = {"books": f"{places[0]}:1", "code": f"{places[1]}:1"}
    facts = prepare(job)
    limit = facts.parts("valid")[1].num_tokens
    assert too_small(facts, limit - 1) == []
    (problem,) = too_small(facts, limit)
    assert problem.message.startswith("valid of code has")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["a:1", "b"], "b has no weight, but others have"),
        (["a:0"], "a weight is 0"),
        (["a:-0.5", "b:1"], "a weight is -0.5"),
        ([], "names no source"),
        (3, "names no source"),
        ([3], "is not a path"),
        ({"a b": "x"}, "cannot be a name"),
        ({"a": {"path": "x", "wieght": 1}}, "there is no key 'wieght'"),
        ({"a": {"weight": 1}}, "its path is not given"),
        ({"a": {"path": "x", "weight": -1}}, "must be a number above 0"),
        ({"a": {"path": "x", "weight": True}}, "must be a number above 0"),
    ],
)
def test_a_form_that_cannot_be_is_named(value, says):
    (problem, *_) = source_problems(DataConfig(path=value))
    assert says in problem.message and problem.key.startswith("data.path")
    with pytest.raises(UserError):
        sources(DataConfig(path=value))


def test_names_come_from_paths_and_are_never_the_same():
    named = sources(DataConfig(path=["x/books.jsonl.gz:1", "y/books:2", "z/my text.d:3"]))
    assert [(spec.name, spec.path) for spec in named] == [
        ("books", "x/books.jsonl.gz"),
        ("books-2", "y/books"),
        ("my-text", "z/my text.d"),
    ]
    named = sources(DataConfig(path=["a/books", "b/books", "c/books-2", "d/books"]))
    assert [spec.name for spec in named] == ["books", "books-3", "books-2", "books-4"]


def test_the_pairs_of_a_folder_are_called_as_no_other_source(places, make_job, tmp_path):
    pairs = tmp_path / "pairs"
    deliver(prepare(make_job(places[0], split="50,50,0")), pairs / "own", overwrite=False)
    job = make_job("", split="1")
    job.data.path = {"books": str(pairs), "books-1": str(places[1])}
    facts = prepare(job)
    assert [part.name for part in facts.parts("train")] == ["books-2", "books-3", "books-1"]


def test_named_pairs_of_equal_names_are_put_apart(places, make_job, tmp_path):
    job = make_job("", split="1")
    job.data.path = {"a": str(places[0]), "b": str(places[1])}
    facts = prepare(job)
    alike = [replace(part, name="same") for part in facts.parts("train")]
    found = targets(replace(facts, blends={"train": alike}), tmp_path / "out")
    assert [place.name for *_, place in found] == ["out-train-same", "out-train-same-2"]
