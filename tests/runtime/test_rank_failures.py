"""Exceptions of torch, Megatron and Python as the failures that they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors
from megaplug.runtime.failures import kind_of, reason_of
from megaplug.runtime.stopwatch import Stopwatch, data_wait

NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 1048576000 bytes. Error code 12 (Cannot allocate memory)"
)
NAN = "Rank 1, node n, device cpu, iteration 7: Unexpected result nan (message='found NaN in the loss')"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41"


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (RuntimeError(NO_MEMORY), "memory", "out of memory at step 7, allocating 1,000 MiB"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
            "memory",
            "out of memory at step 7, allocating 2,048 MiB",
        ),
        (MemoryError(), "memory", "out of memory at step 7"),
        (RuntimeError(NAN), "nan", "NaN in the loss at step 7"),
        (RuntimeError(GLOO), "peer", "lost its connection to another rank at step 7"),
        (SystemExit(3), "exit", "Megatron left at step 7 with 3; the last lines of this log say why"),
        (ValueError("one\ntwo"), "error", "ValueError: one (at step 7)"),
    ],
)
def test_a_failure_gets_its_kind_and_one_line(error: BaseException, kind: str, reason: str) -> None:
    assert kind_of(error) == kind
    assert reason_of(error, kind, 7) == reason
    assert "before the first step" in reason_of(error, kind, None)


def test_a_full_disk_is_named_however_deep_it_lies(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, disk_errors(tmp_path / "metrics.jsonl", "write"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write to an open file fails
    assert kind_of(caught.value) == "disk"
    assert reason_of(caught.value, "disk", 7) == f"no space left on {tmp_path}/metrics.jsonl at step 7"
    with pytest.raises(RuntimeError) as torchs:
        try:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/disk/common.pt")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert kind_of(torchs.value) == "disk"
    assert reason_of(torchs.value, "disk", 7) == "the disk quota of /disk/common.pt is used up at step 7"
    assert (
        kind_of(RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")) == "disk"
    )
    assert kind_of(PermissionError(errno.EACCES, "Permission denied", "/disk/x")) == "error"


def test_what_was_being_done_goes_with_the_exception() -> None:
    with pytest.raises(OSError, match="gone") as caught, data_wait:
        raise OSError("gone")
    assert kind_of(caught.value) == "data"
    data_wait.take()
    assert kind_of(OSError("gone")) == "error"
    watch = Stopwatch("while nothing")
    with watch:
        pass
    assert watch.take() > 0 == watch.take()
