"""The book of live storages counts as CUDA's allocator does."""

from __future__ import annotations

import torch

from megaplug.runtime.rehearsal.book import ACTIVATIONS, TEMPORARY, WEIGHTS, Book, rounded
from megaplug.runtime.rehearsal.meter import watching_resizes


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_bytes_are_rounded_up_to_blocks_of_512():
    assert [rounded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_a_storage_counts_once_however_many_tensors_look_at_it_and_until_the_last_is_gone():
    book = Book()
    tensor = on_meta(100)
    view = tensor[10:]
    book.see(tensor, ACTIVATIONS)
    book.see(view, TEMPORARY)
    assert (book.live[ACTIVATIONS], book.live[TEMPORARY], book.total) == (400, 0, 512)
    del tensor
    assert book.live[ACTIVATIONS] == 400
    del view
    assert book.live[ACTIVATIONS] == book.total == 0


def test_the_peak_is_remembered_by_what_it_was_for_and_forgotten_on_demand():
    book = Book()
    kept = on_meta(256)
    book.see(kept, WEIGHTS)
    for _ in range(2):
        passing = on_meta(1024)
        book.see(passing, TEMPORARY)
        del passing
    assert (book.peak, book.exact_peak) == (5120, 5120)
    assert (book.at_peak[WEIGHTS], book.at_peak[TEMPORARY]) == (1024, 4096)
    book.start_peak()
    assert book.peak == 1024


def test_what_a_storage_is_for_can_be_said_later():
    book = Book()
    tensor, other = on_meta(256), on_meta(3)
    book.see(tensor, ACTIVATIONS)
    book.see(other, ACTIVATIONS)
    book.belongs([tensor], WEIGHTS)
    book.rest_is("other", (WEIGHTS,))
    assert (book.live[WEIGHTS], book.live["other"], book.live[ACTIVATIONS]) == (1024, 12, 0)
    del tensor
    assert book.live[WEIGHTS] == 0


def test_a_storage_that_is_emptied_and_filled_again_is_followed():
    book = Book()
    tensor = on_meta(1024)
    book.see(tensor, ACTIVATIONS)
    with watching_resizes(book):
        tensor.untyped_storage().resize_(0)
        assert book.total == 0
        tensor.untyped_storage().resize_(4096)
    assert book.total == 4096


def test_tensors_of_the_host_are_not_on_the_device():
    book = Book()
    book.see(torch.empty(8), ACTIVATIONS)
    assert book.total == 0
