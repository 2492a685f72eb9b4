"""A ``.bin``/``.idx`` pair is read as Megatron reads it, and a damaged one is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megaplug.data.indexed import is_prefix, read_indexed
from megaplug.errors import UserError

DOCUMENTS = [[5, 6, 7, 1], [9, 1], [300, 2, 1], [1]]


@pytest.fixture(scope="module", params=["uint16", "int32"])
def pair(request, tmp_path_factory) -> Path:
    """The third document has two sequences, as Megatron's own tools write them when they split sentences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("pair") / "some.text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(request.param).type)
    for ids in DOCUMENTS:
        builder.add_document(np.array(ids), [1, len(ids) - 1] if ids[0] == 300 else [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_documents_are_those_of_megatrons_own_reader(pair):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = read_indexed(pair), IndexedDataset(str(pair))
    assert [ours.document(i).tolist() for i in range(ours.num_documents)] == DOCUMENTS
    assert ours.tokens.tolist() == [i for n in range(len(theirs)) for i in theirs[n].tolist()]
    assert ours.tokens.dtype == theirs.index.dtype
    assert (ours.num_documents, ours.num_tokens) == (len(theirs.document_indices) - 1, 10)


def test_any_of_its_names_will_do(pair):
    for name in (pair, Path(f"{pair}.bin"), Path(f"{pair}.idx")):
        assert is_prefix(name)
        assert read_indexed(name).prefix == pair
    assert not is_prefix(pair.parent)
    assert not is_prefix(pair.parent / "other")


@pytest.mark.parametrize(
    ("ending", "change", "says"),
    [
        ("bin", lambda data: data[:-2], "its index speaks of 10 ids"),
        ("idx", lambda data: data[:-9], "is cut off"),
        ("idx", lambda data: data[:20], "is not an index of Megatron's"),
        ("idx", lambda data: b"x" + data[1:], "is not an index of Megatron's"),
        ("idx", lambda data: data[:17] + b"\x06" + data[18:], "ids of type 6"),
        ("idx", lambda data: data[:-8] + b"\xff" * 8, "not in order"),
        ("idx", None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_pair_is_named(ending, change, says, pair, tmp_path):
    for file in pair.parent.iterdir():
        shutil.copy(file, tmp_path)
    file = tmp_path / f"some.text.{ending}"
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=says) as error:
        read_indexed(tmp_path / "some.text", key="inspect")
    assert "inspect" in str(error.value)
    assert str(tmp_path) in str(error.value)
