"""Searches and pictures that are interrupted, and disks that take no answer: one line, and no half a file."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAN = [sys.executable, str(ROOT / "launch" / "plan.py")]
LLAMA = ["model=llama3_8b", "cluster=h100", "precision=bf16", "topology.world_size=64"]
# Seconds of enumeration and scoring.
LONG = [
    *("action=search", "model=arbor_1t_moe", "model.seq_length=4096", "cluster=h100", "precision=bf16"),
    *("topology.world_size=4096", "train.global_batch_size=1024", "attention=te", "output=json"),
]
# A function says through a pipe that it was entered, and waits for a signal; sitecustomize comes first.
TELL = """
import importlib.abc, importlib.util, sys
class Told(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def loaded(module):
                load(module)
                inner = getattr(module, {function!r})
                def told(*args, **options):
                    import os, signal
                    os.write({pipe}, b"entered")
                    signal.pause()
                    return inner(*args, **options)
                setattr(module, {function!r}, told)
            spec.loader.exec_module = loaded
            return spec
sys.meta_path.insert(0, Told())
"""


def interrupted(
    tmp_path: Path, words: list[str], module: str, function: str, number: int
) -> tuple[int, str, str]:
    """A command that gets a signal as soon as it is inside a function: its code, stdout and stderr."""
    reads, writes = os.pipe()
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(TELL.format(module=module, function=function, pipe=writes))
    process = subprocess.Popen(
        [*PLAN, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        pass_fds=(writes,),
        # A test run in a shell's background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(writes)
    # Nothing to read, or the end of the pipe: it was never entered.
    was_entered = bool(select.select([reads], [], [], 60.0)[0] and os.read(reads, 7))
    os.close(reads)
    if not was_entered:
        process.kill()
    assert was_entered, process.communicate()
    os.killpg(process.pid, number)
    shown, error = process.communicate(timeout=30)
    return process.returncode, shown, error


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "interrupted by SIGTERM\n")],
    ids=["Ctrl-C", "SIGTERM"],
)
@pytest.mark.parametrize(
    ("module", "function"),
    [("megaplug.plan.search.score", "score"), ("megaplug.plan.search.grids", "legal")],
    ids=["scoring", "enumerating"],
)
def test_a_search_that_is_interrupted_says_so_in_a_line(tmp_path, module, function, number, said):
    assert interrupted(tmp_path, LONG, module, function, number) == (128 + number, "", said)


@pytest.mark.parametrize("function", ["new_figure", "save", "write_bytes_atomic"])
def test_pictures_that_are_interrupted_leave_whole_files_only(tmp_path, function):
    folder = tmp_path / "pictures"
    words = [*LLAMA, "topology.tp=4", "topology.pp=2", f"pictures={folder}"]
    code, shown, error = interrupted(
        tmp_path, words, "megaplug.plan.pictures.canvas", function, signal.SIGINT
    )
    assert (code, shown, error) == (130, "", "interrupted\n")
    found = sorted(folder.iterdir()) if folder.exists() else []
    assert {path.suffix for path in found} <= {".png", ".json"}
    for path in found:
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:
            assert content.startswith(b"\x89PNG") and content.rstrip().endswith(b"IEND\xaeB`\x82")


def test_a_terminal_shows_how_far_a_search_is_and_clears_that(tmp_path):
    person, terminal = pty.openpty()
    process = subprocess.Popen(
        [*PLAN, *LONG],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(terminal)
    seen = ""
    while "configurations" not in seen:
        seen += os.read(person, 10_000).decode()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    while not seen.endswith("interrupted\r\n"):
        seen += os.read(person, 10_000).decode()
    os.close(person)
    assert seen.endswith(" configurations\r\033[Kinterrupted\r\n")


@pytest.mark.parametrize("words", [["action=search", "top=2"], ["topology.tp=4"]], ids=["search", "plan"])
@pytest.mark.parametrize("output", ["json", "table"])
def test_an_answer_that_a_full_disk_does_not_take_is_told(words, output):
    with Path("/dev/full").open("w") as full:
        command = [*PLAN, *LLAMA, "train=pretrain", *words, f"output={output}"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: the answer cannot be written: No space left on device\n"
