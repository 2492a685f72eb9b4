"""Every form of text gives the tokens of a plain reference, which stands here and is not the room's."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_texts import some_text

from megaplug.data import build, documents, shards
from megaplug.data.compressed import Stream
from megaplug.data.documents import read_documents
from megaplug.data.faults import Faults
from megaplug.data.indexed import read_indexed, write_index
from megaplug.data.libraries import optional
from megaplug.data.prepare import prepare
from megaplug.data.sources import find_corpus
from megaplug.errors import UserError

EOD = 256
TEXTS = [some_text(i, words=30 + 7 * i) for i in range(60)] + ["ä", "\N{GRINNING FACE} \x00 end", "  \n"]


def reference(texts: list[str]) -> Counter[tuple[int, ...]]:
    """Each text as the bytes of its UTF-8 and one id that ends it."""
    return Counter((*text.encode("utf-8"), EOD) for text in texts)


def tokens_of(facts) -> Counter[tuple[int, ...]]:
    """Each document as Megatron's own reader gives it."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(facts.prefixes["train"])
    return Counter(tuple(dataset[i].tolist()) for i in range(len(dataset)))


def lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list[str], key: str = "text", **options: object) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), key: texts})
    pyarrow.parquet.write_table(table, path, **options)


def write_set(path: Path, texts: list[str], **options: object) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(path, **options)


def write_prefix(path: Path, texts: list[str]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for text in texts:
        ids = [*text.encode(), EOD]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{path}.idx")


def write(kind: str, root: Path, texts: list[str] = TEXTS) -> Path:
    """A file or folder that holds the texts in some form."""
    path = root / f"data.{kind}"
    if kind == "txt":
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number}.txt").write_bytes(text.encode())
    elif kind in ("txt.gz", "txt.zst"):
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number}.{kind}").write_bytes(compressed(kind, text.encode()))
    elif kind == "jsonl":
        path.write_bytes(lines(texts))
    elif kind in ("jsonl.gz", "jsonl.zst"):
        data = lines(texts)
        # Two parts behind each other are one file, as parallel compressors write it.
        path.write_bytes(compressed(kind, data[:3000]) + compressed(kind, data[3000:]))
    elif kind == "parquet":
        write_parquet(path, texts, row_group_size=7)
    elif kind == "parquet dictionary":
        path = root / "dictionary.parquet"
        write_parquet(path, texts, use_dictionary=["text"])
    elif kind == "set":
        write_set(path, texts, num_shards=3)
    elif kind == "arrow file":
        import pyarrow

        path = root / "data.arrow"
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    elif kind == "prefix":
        write_prefix(path, texts)
    return path


def compressed(kind: str, data: bytes) -> bytes:
    if kind.endswith(".gz"):
        return gzip.compress(data)
    import zstandard

    return zstandard.compress(data)


KINDS = [
    *("txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst"),
    *("parquet", "parquet dictionary", "set", "arrow file", "prefix"),
]


@pytest.mark.parametrize("shard_bytes", [100, 1000, 8_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_tokens_of_a_plain_reference(kind, shard_bytes, tmp_path, make_job, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    facts = prepare(make_job(write(kind, tmp_path), split="1"))
    assert tokens_of(facts) == reference(TEXTS)
    assert facts.num_tokens["train"] == sum(len(text.encode()) + 1 for text in TEXTS)
    assert facts.num_documents["train"] == len(TEXTS)


def test_the_same_text_in_another_form_is_the_same_data(tmp_path, make_job):
    facts = [prepare(make_job(write(kind, tmp_path))) for kind in KINDS if kind != "prefix"]
    assert {fact.fingerprint for fact in facts} == {facts[0].fingerprint}
    assert {tuple(fact.prefixes.items()) for fact in facts} == {tuple(facts[0].prefixes.items())}


def test_a_folder_may_hold_all_forms(tmp_path, make_job, capsys):
    root = tmp_path / "mixed"
    root.mkdir()
    parts = {kind: [f"{kind} {text}" for text in TEXTS[:9]] for kind in KINDS if kind != "prefix"}
    for kind, texts in parts.items():
        write(kind, root, texts)
    (root / "README.md").write_text("about")
    (root / "page.html").write_text("<p>")
    facts = prepare(make_job(root, split="1"))
    assert tokens_of(facts) == reference([text for texts in parts.values() for text in texts])
    said = capsys.readouterr().err
    assert f"left out of {root}: " in said and "1 x .md" in said and "1 x .html" in said


def test_a_folder_of_text_and_of_prefixes_is_drawn_by_their_sizes(tmp_path, make_job):
    root = tmp_path / "mixed"
    root.mkdir()
    (root / "a.txt").write_bytes(b"x" * 299)
    write_prefix(root / "b", ["y" * 99])
    facts = prepare(make_job(root, split="1"))
    assert facts.prefixes == {}
    assert [(part.weight, part.num_tokens) for part in facts.parts("train")] == [(0.75, 300), (0.25, 100)]
    assert facts.data_path("train")[::2] == ["0.75", "0.25"]


def test_an_index_is_byte_for_byte_that_of_megatrons_builder(tmp_path):
    write_prefix(tmp_path / "theirs", TEXTS)
    lengths = np.array([len(text.encode()) + 1 for text in TEXTS])
    write_index(tmp_path / "ours.idx", "uint16", lengths)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("name", ["data", "data.bin", "data.idx"])
def test_a_whole_prefix_is_used_as_it_is(name, tmp_path, make_job):
    write_prefix(tmp_path / "data", TEXTS)
    facts = prepare(make_job(tmp_path / name, split="1"))
    assert facts.prefixes == {"train": str(tmp_path / "data")}


def test_the_splits_of_a_prefix_lie_in_its_own_file_and_cover_it(tmp_path, make_job):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write_prefix(tmp_path / "data", TEXTS)
    facts = prepare(make_job(tmp_path / "data", split="70,20,10"))
    wanted = [i for text in TEXTS for i in (*text.encode(), EOD)]
    total, found = len(wanted), []
    for split, share in (("train", 0.7), ("valid", 0.9), ("test", 1.0)):
        dataset = IndexedDataset(facts.prefixes[split])
        found += [i for number in range(len(dataset)) for i in dataset[number].tolist()]
        assert len(found) == int(total * share)
        assert facts.num_documents[split] == len(dataset)
        assert Path(facts.prefixes[split] + ".bin").resolve() == tmp_path / "data.bin"
        assert read_indexed(Path(facts.prefixes[split])).num_tokens == facts.num_tokens[split]
    assert found == wanted
    # A part of a prefix is a prefix again.
    again = prepare(make_job(facts.prefixes["valid"], split="1"))
    assert tokens_of(again).total() == facts.num_documents["valid"]


def test_a_part_of_a_prefix_can_be_split_again(tmp_path, make_job):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write_prefix(tmp_path / "data", TEXTS)
    first = prepare(make_job(tmp_path / "data", split="20,80"))
    second = prepare(make_job(first.prefixes["valid"], split="30,70"))
    wanted = [i for text in TEXTS for i in (*text.encode(), EOD)][first.num_tokens["train"] :]
    found = []
    for split in ("train", "valid"):
        dataset = IndexedDataset(second.prefixes[split])
        found += [i for number in range(len(dataset)) for i in dataset[number].tolist()]
        assert Path(second.prefixes[split] + ".bin").resolve() == tmp_path / "data.bin"
    assert found == wanted
    assert second.num_tokens["train"] == int(len(wanted) * 0.3)


def test_a_prefix_of_another_tokenizer_is_refused_and_one_without_ends_is_said(tmp_path, make_job, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, ids in (("large", [5, 300, EOD]), ("endless", [5, 6, 7])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        builder.add_document(np.array(ids), [3])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    with pytest.raises(UserError, match=r"holds the id 300, but the tokenizer has 257 ids"):
        prepare(make_job(tmp_path / "large", split="1"))
    for _ in range(2):
        prepare(make_job(tmp_path / "endless", split="1"))
        assert "1 of 1 documents" in capsys.readouterr().err


def test_half_a_prefix_is_named(tmp_path, make_job):
    write_prefix(tmp_path / "data", TEXTS)
    (tmp_path / "data.idx").unlink()
    with pytest.raises(UserError, match=r"data\.bin has no data\.idx beside it"):
        prepare(make_job(tmp_path / "data"))
    with pytest.raises(UserError, match=r"data\.bin has no data\.idx beside it"):
        prepare(make_job(tmp_path))


def test_a_column_may_have_any_name_and_a_wrong_one_is_answered_with_those_there_are(tmp_path, make_job):
    write_parquet(tmp_path / "a.parquet", TEXTS, key="body")
    facts = prepare(make_job(tmp_path / "a.parquet", split="1", text_key="body"))
    assert tokens_of(facts) == reference(TEXTS)
    with pytest.raises(UserError, match="no column 'text'; its columns are: 'id', 'body'"):
        prepare(make_job(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"'id' of .* holds int64, not strings"):
        prepare(make_job(tmp_path / "a.parquet", text_key="id"))


def test_a_table_that_becomes_shorter_while_it_is_read_is_named(tmp_path, make_job, monkeypatch):
    """It is cut once, and then written anew with fewer groups of rows before the first is read."""
    file = tmp_path / "rows.parquet"
    write_parquet(file, TEXTS, row_group_size=7)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    real = build.cut
    calls = []

    def then_write(corpus):
        calls.append(corpus)
        found = list(real(corpus))
        write_parquet(file, TEXTS, row_group_size=30)
        return iter(found)

    monkeypatch.setattr(build, "cut", then_write)
    with pytest.raises(UserError, match=r"rows\.parquet changed while it was read: it has 3 row groups"):
        prepare(make_job(file))
    assert len(calls) == 1


def test_a_dictionary_of_sets_names_its_splits_and_each_is_a_source(tmp_path, make_job):
    import datasets

    splits = {"train": TEXTS[:50], "validation": TEXTS[50:]}
    made = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "both")
    both = tmp_path / "both"
    with pytest.raises(UserError, match="the splits: train, validation") as error:
        prepare(make_job(both))
    words = f"data.path={both}/train data.valid_path={both}/validation"
    assert words in error.value.hint
    facts = prepare(make_job(both / "train", valid_path=str(both / "validation")))
    assert tokens_of(facts) == reference(splits["train"])
    assert facts.num_documents == {"train": 50, "valid": len(TEXTS) - 50, "test": 0}


def test_caches_that_lie_beside_a_set_are_not_read(tmp_path, make_job):
    write_set(tmp_path / "set", TEXTS)
    (tmp_path / "set" / "cache-1234.arrow").write_bytes(b"not this")
    assert tokens_of(prepare(make_job(tmp_path / "set", split="1"))) == reference(TEXTS)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("jsonl.gz", "cannot be decompressed"),
        ("jsonl.zst", "cannot be decompressed"),
        ("parquet", "is no parquet file that can be read"),
        ("arrow file", "is no arrow file that can be read"),
    ],
)
def test_a_file_that_is_cut_off_is_named(kind, says, tmp_path, make_job):
    path = write(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=says) as error:
        prepare(make_job(path))
    assert path.name in error.value.message


@pytest.mark.parametrize("log2", [28, 31])
def test_a_zst_with_a_long_window_is_read(log2, tmp_path, make_job):
    """As zstd --long=31 writes them; RFC 8878: descriptor, window, one last block that is not compressed."""
    data = lines(TEXTS)
    block = (1 | len(data) << 3).to_bytes(3, "little") + data
    (tmp_path / "long.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes([0, (log2 - 10) << 3]) + block)
    assert tokens_of(prepare(make_job(tmp_path / "long.jsonl.zst", split="1"))) == reference(TEXTS)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_file_that_is_only_called_compressed_is_told_from_a_damaged_one(kind, tmp_path, make_job):
    path = write(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError) as error:
        prepare(make_job(path))
    assert "copy it again" in error.value.hint
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(UserError) as error:
        prepare(make_job(path))
    assert f"take {path.suffix} from its name" in error.value.hint


def test_a_library_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"x\.parquet needs the package pyarrow") as error:
        optional("pyarrow.parquet", "x.parquet")
    assert "pip install pyarrow" in error.value.hint and "megaplug[data]" in error.value.hint


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("giant", [0, 1, 2])
def test_a_line_longer_than_many_parts_is_read_once(giant, piece, tmp_path, make_job, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    monkeypatch.setattr(documents, "_PIECE", piece)
    texts = ["first", "second", "third"]
    texts[giant] = "long " * 2_000
    file = tmp_path / "giant.jsonl"
    file.write_bytes(lines(texts))
    given = 0

    class Counted(io.BytesIO):
        def readline(self, size: int = -1, /) -> bytes:
            return self._counted(super().readline(size))

        def __next__(self) -> bytes:
            return self._counted(super().__next__())

        def _counted(self, line: bytes) -> bytes:
            nonlocal given
            given += len(line)
            return line

    @contextlib.contextmanager
    def opened(path: Path):
        data = Counted(path.read_bytes())
        yield Stream(data, data)

    monkeypatch.setattr(documents, "open_stream", opened)
    found = list(read_documents(find_corpus(str(file)), Faults()))
    assert [document.text.decode() for document in found] == texts
    assert sum(document.num_read for document in found) == file.stat().st_size
    assert given < 2.5 * file.stat().st_size
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    assert tokens_of(prepare(make_job(file, split="1"))) == reference(texts)


@pytest.mark.parametrize("shard_bytes", [99, 100, 101, 200])
def test_a_line_that_begins_where_a_part_begins_is_read_once(shard_bytes, tmp_path, make_job, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    # Each line has 100 bytes.
    texts = [f"{number:088}" for number in range(50)]
    (tmp_path / "even.jsonl").write_text("".join(f'{{"text":"{text}"}}\n' for text in texts))
    assert (tmp_path / "even.jsonl").stat().st_size == 5_000
    assert tokens_of(prepare(make_job(tmp_path / "even.jsonl", split="1"))) == reference(texts)
