"""Lines and documents that cannot be used: counted and shown with their place, then refused or left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_texts import some_text

from megaplug.data import cache, shards
from megaplug.data.prepare import prepare
from megaplug.errors import UserError

GOOD = [json.dumps({"text": some_text(i)}).encode() for i in range(30)]
BAD = {
    7: (b'{"text": ', "is not JSON"),
    11: (b'{"body": "x"}', "has no key 'text'; its keys are: 'body'"),
    12: (b'{"text": 3}', "holds a number under 'text', not a string"),
    20: (b'{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9"),
    23: (b"[1]", "is a list, not an object"),
    31: (b'{"text": null}', "holds null under 'text', not a string"),
    33: (b'{"text": "\\ud800"}', "holds half a character"),
}


def spoiled() -> list[bytes]:
    """Thirty good lines with the bad ones at their numbers, blank and empty ones at the end."""
    lines, good = [], iter(GOOD)
    for number in range(1, len(GOOD) + len(BAD) + 1):
        lines.append(BAD[number][0] if number in BAD else next(good))
    return [*lines, b"", b'{"text": ""}', b"   "]


@pytest.fixture(params=[100, 8_000_000])
def file(tmp_path, request, monkeypatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_BYTES", request.param)
    monkeypatch.setattr(cache, "_TICK_NS", -(10**15))
    (tmp_path / "some.jsonl").write_bytes(b"\n".join(spoiled()) + b"\n")
    return tmp_path / "some.jsonl"


def test_bad_lines_are_refused_with_their_number_and_the_first_of_them(file, make_job):
    for _ in range(2):  # the second is told from what was remembered
        with pytest.raises(UserError) as error:
            prepare(make_job(file))
        said = error.value.message
        assert "7 lines or documents cannot be used" in said and "and 2 more" in said
        for number, (_, what) in list(BAD.items())[:5]:
            assert f"{file}:{number} {what}" in said
        assert "data.bad_lines=skip" in error.value.hint


def test_bad_lines_are_left_out_where_it_is_asked_and_said_at_every_start(
    file, make_job, capsys, monkeypatch
):
    facts = prepare(make_job(file, bad_lines="skip", split="1"))
    clean = file.with_name("clean.jsonl")
    clean.write_bytes(b"\n".join(GOOD))
    first = capsys.readouterr().err
    assert facts.num_bad == 7
    assert "7 lines or documents cannot be used and left out" in first and f"{file}:23 is a list" in first
    monkeypatch.setattr("megaplug.data.prepare.digest_documents", None)  # nothing is read again
    again = prepare(make_job(file, bad_lines="skip", split="1"))
    assert again == facts
    assert capsys.readouterr().err == first
    monkeypatch.undo()
    assert prepare(make_job(clean, split="1")).fingerprint == facts.fingerprint


def test_one_bad_line_is_named_by_itself(tmp_path, make_job):
    (tmp_path / "one.jsonl").write_bytes(b'{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match=r"one\.jsonl:2 has no key 'text'; its keys are: 'txt'") as error:
        prepare(make_job(tmp_path / "one.jsonl"))
    assert "data.text_key=" in error.value.hint and "data.bad_lines=skip" in error.value.hint


def test_a_bad_file_and_a_bad_row_are_left_out_too(tmp_path, make_job):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_bytes(b"good")
    bad = pyarrow.array([b"row", b"\xff", None], type=pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "rows.parquet")
    with pytest.raises(UserError) as error:
        prepare(make_job(tmp_path, split="1"))
    for what in (
        "latin.txt is not UTF-8",
        "rows.parquet, row 2 is not UTF-8",
        "rows.parquet, row 3 holds null",
    ):
        assert what in error.value.message
    facts = prepare(make_job(tmp_path, split="1", bad_lines="skip"))
    assert (facts.num_documents["train"], facts.num_bad) == (2, 3)


@pytest.mark.parametrize("shard_bytes", [1, 8_000_000])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_bad_row_is_numbered_from_the_beginning_of_its_file(
    kind, shard_bytes, tmp_path, make_job, monkeypatch
):
    """Ten rows in groups of four, one more in a batch than is read at once."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr("megaplug.data.tables._ROWS_AT_ONCE", 3)
    texts = [None if row in (6, 10) else f"text {row}" for row in range(1, 11)]
    table = pyarrow.table({"text": texts})
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=4)
    else:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    with pytest.raises(UserError) as error:
        prepare(make_job(file, split="1"))
    said = [line.split(" holds")[0].strip() for line in error.value.message.splitlines()[1:]]
    assert said == [f"{file}, row 6", f"{file}, row 10"]


def test_a_source_of_nothing_but_bad_lines_holds_no_text(tmp_path, make_job):
    (tmp_path / "bad.jsonl").write_bytes(b"x\ny\n")
    with pytest.raises(UserError, match="there is no text"):
        prepare(make_job(tmp_path / "bad.jsonl", bad_lines="skip"))
