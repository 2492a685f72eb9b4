"""Rehearsals that are interrupted, ended or killed: one line, and neither a process nor a file is left."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Ranks that take long enough to be met.
WORDS = ("model=llama3_8b", "topology.pp=4", "precision=bf16", "train.global_batch_size=256", "ranks=[0,8]")
SIZES = ("topology.world_size=16", "topology.tp=2", "train.micro_batch_size=1")


@contextlib.contextmanager
def rehearsing(place: Path, *, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own; nothing of it is left behind by a test that fails."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "plan.py"), "action=rehearse", *WORDS, *SIZES],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        # A test run in a shell's background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        try:
            yield process
        finally:
            for left in [process.pid, *helpers(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)


def helpers(parent: int) -> list[int]:
    """The processes that rehearse for a command, those of single ranks included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[-2:] == ["megaplug.runtime.rehearsal", str(parent)]:
                found.append(process.pid)
    return found


def ranks_of(parent: int) -> list[int]:
    """Those of single ranks: libraries that are imported start helpers, too, and those write no answer."""
    return [pid for pid in helpers(parent) if is_rank(pid, parent)]


def is_rank(pid: int, parent: int) -> bool:
    """Whether a helper was forked by the first one and has the file in memory for what it counts."""
    with contextlib.suppress(psutil.Error, OSError):
        files = [str(found.readlink()) for found in Path(f"/proc/{pid}/fd").iterdir()]
        return psutil.Process(pid).ppid() != parent and any("megaplug-found" in name for name in files)
    return False


def until(holds: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 90.0) -> None:
    """Until something holds of a command that is still there."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        assert process.returncode is not None or process.poll() is None, "the command has ended"
        # Nothing tells of the children of another process: they are looked for until the deadline.
        time.sleep(0.01)


def nobody_is_left(process: subprocess.Popen[str]) -> None:
    until(lambda: not helpers(process.pid), process, timeout_s=15.0)


@pytest.mark.parametrize(
    "met", [helpers, pytest.param(ranks_of, marks=pytest.mark.slow)], ids=["importing", "ranks"]
)
@pytest.mark.parametrize(
    ("number", "to_group", "said"),
    [
        (signal.SIGINT, True, "interrupted\n"),
        (signal.SIGTERM, False, "interrupted by SIGTERM\n"),
        (signal.SIGHUP, True, "interrupted by SIGHUP\n"),
        (signal.SIGKILL, False, ""),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "SIGKILL"],
)
def test_whatever_ends_a_rehearsal_leaves_nothing(tmp_path, number, to_group, said, met):
    with rehearsing(tmp_path) as process:
        until(lambda: bool(met(process.pid)), process)
        (os.killpg if to_group else os.kill)(process.pid, number)
        shown, error = process.communicate(timeout=30)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert (shown, error) == ("", said)
        nobody_is_left(process)
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_shows_which_rank_and_ctrl_c_stands_on_a_line_of_its_own(tmp_path):
    person, terminal = pty.openpty()
    with rehearsing(tmp_path, stderr=terminal) as process:
        os.close(terminal)
        until(lambda: bool(helpers(process.pid)), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
        nobody_is_left(process)
    seen = os.read(person, 10_000).decode()
    os.close(person)
    assert seen == "\r\033[Krehearsing rank 0 (0 of 2 ranks done) ...\r\033[Kinterrupted\r\n"


@pytest.mark.parametrize(
    ("victims", "of"), [(ranks_of, r" of rank [08]"), (helpers, "")], ids=["a rank", "the process of all"]
)
def test_a_helper_that_is_killed_is_told_with_the_probable_reason(tmp_path, victims, of):
    with rehearsing(tmp_path) as process:
        until(lambda: bool(victims(process.pid)), process)
        os.kill(victims(process.pid)[0], signal.SIGKILL)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 1
        told = f"error: the rehearsal{of} was ended, probably for want of memory\n  hint: "
        assert re.match(told, error), error
        nobody_is_left(process)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (
            "sys.modules['torch'] = None",
            ["error: the rehearsal failed: torch or Megatron cannot be imported: ", "hint: action=doctor"],
        ),
        (
            "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']",
            ["No usable temporary directory found", "hint: free some space there, or type TMPDIR="],
        ),
    ],
    ids=["no torch", "no folder for temporary files"],
)
def test_a_machine_that_cannot_rehearse_is_told_in_one_message(tmp_path, fault, parts):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{fault}\n")
    paths = [str(tmp_path), str(ROOT)]
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), "action=rehearse", *WORDS, *SIZES]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert all(part in done.stderr for part in parts)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 2
