"""Figures of a prepared set are those of numpy on the same ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaplug.data import inspection
from megaplug.data.indexed import read_indexed, write_index
from megaplug.data.inspection import inspect, length_figures, length_histogram
from megaplug.data.tokenizers import ByteTokenizer
from megaplug.errors import UserError

TEXTS = ["the ring of ranks turns", "größe \U0001f642", "", "x" * 4000]


@pytest.fixture
def pair(tmp_path) -> Path:
    ids = ByteTokenizer().encode_documents([text.encode() for text in TEXTS])
    np.concatenate(ids).astype(np.uint16).tofile(tmp_path / "set.bin")
    write_index(tmp_path / "set.idx", "uint16", np.array([one.size for one in ids]))
    return tmp_path / "set"


@pytest.mark.parametrize("at_once", [7, 4_000_000])
def test_counts_are_those_of_the_ids(pair, at_once, monkeypatch):
    monkeypatch.setattr(inspection, "_IDS_AT_ONCE", at_once)
    found = inspect(read_indexed(pair), ByteTokenizer())
    ids = np.fromfile(f"{pair}.bin", dtype=np.uint16)
    assert (found.num_tokens, found.num_documents, found.num_ends) == (ids.size, 4, 4)
    assert (found.num_used_ids, found.largest_id) == (np.unique(ids).size, 256)
    assert (found.vocab_size, found.id_type, found.num_bytes) == (257, "uint16", 2 * ids.size)
    assert found.sample == TEXTS[0]
    assert found.as_json()["lengths"]["longest"] == 4001


def test_lengths_are_in_figures_and_powers_of_two():
    lengths = np.array([1, 2, 3, 4, 7, 8, 1000])
    figures = length_figures(lengths)
    assert figures["median"] == 4 and figures["shortest"] == 1 and figures["longest"] == 1000
    assert figures["mean"] == pytest.approx(lengths.mean())
    rows = length_histogram(lengths)
    assert rows[:4] == [(1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 1)]
    assert rows[-1] == (512, 1023, 1)
    assert sum(number for *_, number in rows) == lengths.size
    for low, high, number in rows:
        assert number == ((lengths >= low) & (lengths <= high)).sum()
    assert length_histogram(np.array([0, 0, 1])) == [(0, 0, 2), (1, 1, 1)]
    assert (length_figures(np.zeros(0)), length_histogram(np.zeros(0))) == ({}, [])


def test_bytes_a_token_are_those_of_the_text(pair):
    found = inspect(read_indexed(pair), ByteTokenizer())
    # The last document is sampled for its first 2,000 ids, the others have an end that is no text.
    sizes = [len(text.encode()) for text in TEXTS[:3]]
    assert found.bytes_per_token == pytest.approx((sum(sizes) + 2000) / (sum(sizes) + 3 + 2000))


def test_a_tokenizer_that_lacks_ids_shows_no_text(pair):
    class Smaller(ByteTokenizer):
        vocab_size = 100

    found = inspect(read_indexed(pair), Smaller())
    assert (found.vocab_size, found.sample, found.num_ends, found.bytes_per_token) == (None, None, None, None)
    assert inspect(read_indexed(pair), None).largest_id == 256


def test_a_long_beginning_is_cut(pair):
    found = inspect(read_indexed(pair), ByteTokenizer(), sample_characters=8)
    assert found.sample == "the ring..."


@pytest.mark.parametrize("wrong", [-1, 2**31 - 1])
def test_numbers_that_are_no_ids_are_named(wrong, tmp_path):
    np.array([5, wrong, 7], dtype=np.int32).tofile(tmp_path / "set.bin")
    write_index(tmp_path / "set.idx", "int32", np.array([3]))
    with pytest.raises(UserError, match=f"{wrong:,}, which is no id"):
        inspect(read_indexed(tmp_path / "set"), None)


def test_an_empty_set_has_no_figures(tmp_path):
    (tmp_path / "set.bin").touch()
    write_index(tmp_path / "set.idx", "int32", np.zeros(0, dtype=np.int64))
    found = inspect(read_indexed(tmp_path / "set"), ByteTokenizer())
    assert (found.num_tokens, found.largest_id, found.histogram, found.sample) == (0, -1, [], "")
