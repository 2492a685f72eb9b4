from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megaplug.data.delivery import deliver
from megaplug.data.documents import read_documents
from megaplug.data.faults import Faults
from megaplug.data.prepare import prepare
from megaplug.data.sources import find_corpus
from megaplug.errors import UserError


def texts(path: Path | str, key: str = "text") -> list[str]:
    """The documents that are not empty."""
    faults = Faults()
    documents = [d.text.decode() for d in read_documents(find_corpus(str(path), key), faults)]
    faults.refuse()
    return [text for text in documents if text]


def test_the_standard_library_is_python_sources_without_tests_or_packages():
    corpus = find_corpus("stdlib")
    names = [file.name for file in corpus.files]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert names == sorted(names)
    assert all(name.endswith(".py") for name in names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__"}
    assert 5e6 < corpus.size < 30e6
    assert b"class ArgumentParser" in b"".join(d.text for d in read_documents(corpus, Faults()))


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert texts(tmp_path / "a.txt") == ["one\ntwo\n"]


def test_a_folder_is_read_in_the_order_of_its_names_without_hidden_and_other_files(tmp_path):
    for name in ("b.txt", "a/z.TXT", "c.jsonl", ".hidden/h.txt", ".h.txt", "notes.md", "empty.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"text": "from c"}\n\n' if name == "c.jsonl" else "" if "empty" in name else name)
    (tmp_path / "round").symlink_to(tmp_path)
    assert texts(tmp_path) == ["a/z.TXT", "b.txt", "from c"]


def test_a_jsonl_line_is_one_document_under_the_given_key(tmp_path):
    lines = [{"body": "ä\n"}, {"body": "second", "text": "not this"}, {"body": ""}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert texts(tmp_path / "a.jsonl", key="body") == ["ä\n", "second"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("latin.txt", b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "byte 0xe9 at offset 24"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2 is not JSON"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl:1 is not JSON"),
        ("keys.jsonl", b'{"body": 1, "title": 2}\n', "has no key 'text'; its keys are: 'body', 'title'"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1 is a list, not an object"),
        ("number.jsonl", b'{"text": 3}\n', "holds a number under 'text', not a string"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half a character"),
        ("page.html", b"<p>", "ends in '.html'"),
    ],
)
def test_bad_content_is_named_with_its_place(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        texts(tmp_path / name)
    assert says in str(error.value)
    assert name in str(error.value)


def test_a_missing_path_an_empty_path_and_a_folder_without_text_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        texts(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.path: it is empty"):
        texts("")
    with pytest.raises(UserError, match="it is empty"):
        texts(tmp_path)
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(UserError, match=r"1 x \.md"):
        texts(tmp_path)


def test_a_pair_in_capitals_is_no_pair_and_named(tmp_path, make_job, capsys):
    for name in ("x.BIN", "x.IDX"):
        (tmp_path / name).write_bytes(b"MMIDIDX")
        with pytest.raises(UserError, match=rf"x\.{name[2:]} ends in '\.{name[2:]}', not in a known kind"):
            prepare(make_job(tmp_path / name))
    with pytest.raises(UserError, match=r"no file of a known kind .* 1 x \.BIN"):
        texts(tmp_path)
    (tmp_path / "a.txt").write_text("a" * 100)
    prepare(make_job(tmp_path))
    said = capsys.readouterr().err
    assert "1 x .BIN" in said and "1 x .IDX" in said


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("x")
    file.chmod(0)
    if os.access(file, os.R_OK):  # a superuser reads everything

        def refuse(path: Path, *_: object):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"secret\.txt cannot be read: Permission denied"):
        texts(file)


def test_a_cache_inside_the_source_is_no_text_of_it(corpus_folder, make_job):
    told = [prepare(make_job(corpus_folder, cache_dir=str(corpus_folder / "cache"))) for _ in range(3)]
    assert told[0] == told[1] == told[2]
    assert told[0].source == "corpus/ (13 files)"
    linked = corpus_folder.parent / "linked"
    linked.symlink_to(corpus_folder / "cache")
    assert prepare(make_job(corpus_folder, cache_dir=str(linked))).num_tokens == told[0].num_tokens


def test_a_source_that_is_the_cache_is_refused(corpus_folder, make_job):
    with pytest.raises(UserError, match="is the cache"):
        prepare(make_job(corpus_folder, cache_dir=str(corpus_folder)))


def test_the_name_of_a_folder_counts_text_and_pairs(tmp_path, corpus_folder, make_job):
    deliver(prepare(make_job(corpus_folder)), corpus_folder / "own", overwrite=False)
    assert find_corpus(str(corpus_folder)).title == "corpus/ (13 files, 2 tokenized)"
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for file in corpus_folder.glob("own-train.*"):
        file.rename(pairs / file.name)
    assert find_corpus(str(pairs)).title == "pairs/ (1 tokenized)"


def test_a_link_to_text_that_is_not_there_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".b.txt").symlink_to("nowhere.txt")
    (tmp_path / "c.md").symlink_to("nowhere.md")
    (tmp_path / "d.txt").symlink_to("a.txt")
    assert texts(tmp_path) == ["a", "a"]
    (tmp_path / "e.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(UserError, match=r"e\.jsonl is a link to nowhere\.jsonl, which is not there"):
        texts(tmp_path)
