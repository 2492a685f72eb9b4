"""What a forked writer sees, outlives and shares; what is said when it fails."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import select
import signal
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from megaplug.errors import UserError
from megaplug.runtime import writers
from megaplug.runtime.failures import kind_of, reason_of
from megaplug.runtime.forking import Unsharing, keep_from_forks, ranges_of

Request = namedtuple("Request", ["async_fn", "async_fn_args"])


@pytest.fixture(autouse=True)
def no_thread_pool() -> Iterator[None]:
    """Forked processes of these tests only look at memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fork(act: Callable[[], None]) -> int:
    """A process that ends with 0 when ``act`` has returned."""
    pid = os.fork()
    if pid == 0:
        # One that is to die of what it touches has nothing to tell of it.
        faulthandler.disable()
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    """As `os.waitstatus_to_exitcode`: negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_tensor_that_is_a_part_of_a_larger_one_fills_its_storage_without_being_copied() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn):
        whole = torch.arange(64, dtype=torch.float32).to(dtype)
        part = whole[16:32].view(4, 4)
        found = writers.filling_its_storage(part)
        assert found.untyped_storage().nbytes() == part.nbytes and found.data_ptr() == part.data_ptr()
        assert (found.dtype, found.shape) == (dtype, part.shape)
        assert found.view(torch.uint8).equal(part.view(torch.uint8))
    with_gaps = torch.zeros(8, 8)[:, :4]
    assert writers.filling_its_storage(with_gaps).data_ptr() == with_gaps.data_ptr()
    assert writers.filling_its_storage(torch.nn.Parameter(torch.ones(8))[2:4]).requires_grad is False


def test_a_writer_sees_what_was_when_it_was_forked() -> None:
    tensor, (mine, others) = torch.ones(4 << 20), os.pipe()
    pid = fork(lambda: os._exit(0 if os.read(mine, 1) and bool((tensor == 1).all()) else 1))
    unsharing = Unsharing(ranges_of([tensor]))
    tensor.fill_(2)
    unsharing.end()
    os.write(others, b"x")
    assert ended(pid) == 0 and bool((tensor == 2).all())


def minor_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def test_pages_that_were_unshared_cost_the_thread_that_writes_to_them_no_fault() -> None:
    pages, (mine, others) = 4096, os.pipe()
    tensor = torch.ones(pages * 1024)
    faults = []
    for unshares in (False, True):
        pid = fork(lambda: os._exit(len(os.read(mine, 1)) - 1))
        if unshares:
            Unsharing(ranges_of([tensor]))._thread.join()
        before = minor_faults()
        tensor.add_(1)
        faults.append(minor_faults() - before)
        os.write(others, b"x")
        assert ended(pid) == 0
    assert faults[0] > 0.9 * pages and faults[1] < 0.1 * pages


def test_what_is_kept_from_forks_is_not_there() -> None:
    kept = torch.ones(1 << 20)
    shared = torch.ones(1 << 20)
    keep_from_forks([kept])
    assert ended(fork(lambda: shared.sum().item() and None)) == 0
    assert ended(fork(lambda: kept.sum().item() and None)) == -signal.SIGSEGV
    assert bool((kept == 1).all())


def test_ranges_that_touch_are_one() -> None:
    whole = torch.zeros(100)
    at = whole.data_ptr()
    assert ranges_of([whole[50:60], whole[10:50], whole[80:90]]) == [
        (at + 40, at + 240),
        (at + 320, at + 360),
    ]
    assert ranges_of([torch.zeros(0), torch.zeros(4, device="meta")]) == []


def test_a_writer_goes_when_its_rank_is_killed_and_hears_no_other_signal() -> None:
    (read, write), (told, tell) = os.pipe(), os.pipe()

    def write_forever(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        os.write(tell, b"x")
        while True:
            signal.pause()

    def be_a_rank() -> None:
        request = writers.apart(Request(write_forever, ()))
        fork(request.async_fn)
        while True:
            signal.pause()

    rank = fork(be_a_rank)
    os.close(write)
    os.close(tell)
    assert os.read(told, 1) == b"x"
    os.kill(rank, signal.SIGKILL)
    assert ended(rank) == -signal.SIGKILL
    # Nobody holds its other end any more.
    assert select.select([read], [], [], 20.0)[0] and os.read(read, 1) == b""


def test_a_rank_with_nothing_to_write_forks_nothing() -> None:
    request = Request(None, ())
    assert writers.apart(request) is request and writers.ranges_of(request) == []


def failure(*errors: BaseException) -> CheckpointException:
    return CheckpointException("write", {rank: (error, []) for rank, error in enumerate(errors)})  # type: ignore[arg-type]


GONE = "a helper process of this rank has gone (killed, perhaps by the kernel for want of memory)"


@pytest.mark.parametrize(
    ("error", "kind", "said", "reason"),
    [
        (
            RuntimeError(
                "Worker failure: An error is caught while starting worker 0, error: cannot write "
                "/disk/__0_0.distcp: No space left on device\n  hint: free some"
            ),
            "disk",
            "rank 0: cannot write /disk/__0_0.distcp: No space left on device",
            "no space left on /disk/__0_0.distcp while saving step 40",
        ),
        (
            RuntimeError("results_queue should not be empty"),
            "helper",
            f"rank 0: {GONE}",
            f"cannot save the checkpoint of step 40: rank 0: {GONE}",
        ),
        (
            OSError(30, "Read-only file system", "/disk/x"),
            "disk",
            "rank 0: cannot write /disk/x: Read-only file system",
            "/disk/x may not be written to (read-only file system) while saving step 40",
        ),
        (
            OSError(122, "Disk quota exceeded", "/disk/x"),
            "disk",
            "rank 0: cannot write /disk/x: Disk quota exceeded",
            "the disk quota of /disk/x is used up while saving step 40",
        ),
        (
            RuntimeError("what else\nand where"),
            "error",
            "rank 0: what else",
            "cannot save the checkpoint of step 40: rank 0: what else (at step 41)",
        ),
    ],
)
def test_a_writer_that_has_failed_is_named_with_its_checkpoint_and_its_file(
    error: BaseException, kind: str, said: str, reason: str
) -> None:
    with pytest.raises(UserError) as raised, writers.told_of(40):
        raise failure(error)
    assert raised.value.message.startswith(f"cannot save the checkpoint of step 40: {said}")
    assert (kind_of(raised.value), raised.value.exit_code) == (kind, 1)
    assert reason_of(raised.value, kind, 41) == reason


def test_a_manager_that_was_killed_is_a_helper_and_no_other_rank() -> None:
    with multiprocessing.get_context("fork").Manager() as manager:
        queue = manager.Queue()
        os.kill(manager._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        manager._process.join()  # type: ignore[attr-defined]
        with pytest.raises((EOFError, ConnectionError, FileNotFoundError)) as direct:
            queue.put(1)
    assert kind_of(direct.value) == "helper"
    assert reason_of(direct.value, "helper", 41) == f"{GONE} at step 41"
    # As torch sends it from rank to rank: without a traceback, which stands beside.
    frames = traceback.extract_tb(direct.value.__traceback__)
    sent = type(direct.value)(*direct.value.args)
    with pytest.raises(UserError) as raised, writers.told_of(40):
        raise CheckpointException("write", {0: (sent, frames)})
    assert (kind_of(raised.value), raised.value.message.endswith(GONE)) == ("helper", True)
    # The connections of ranks run through no manager.
    assert kind_of(ConnectionResetError(104, "Connection reset by peer")) == "peer"


def test_a_rank_whose_own_part_was_written_leaves_the_word_to_the_other() -> None:
    with pytest.raises(UserError) as raised, writers.told_of(40):
        raise failure()
    assert kind_of(raised.value) == "peer"
