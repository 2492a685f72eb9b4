"""A signal while a command is still being imported: one line and its code, not a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Ctrl-C at the moment at which the command's own module is looked for.
EARLY = """
import os, signal, sys
class Early:
    def find_spec(self, name, *_):
        if name == "megaplug.commands.{name}":
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Early())
sys.argv = ["launch/{name}.py", "--help"]
import runpy
runpy.run_path("launch/{name}.py", run_name="__main__")
"""


def run(name, handler, number=signal.SIGINT):
    return subprocess.run(
        [sys.executable, "-c", EARLY.format(name=name, signal=number.name)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )


@pytest.mark.parametrize("name", ["train", "plan", "prepare", "checkpoint", "runs"])
def test_ctrl_c_during_imports_is_one_line(name):
    done = run(name, signal.default_int_handler)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("name", ["train", "plan", "prepare", "checkpoint", "runs"])
def test_where_ctrl_c_is_ignored_it_stays_so(name):
    done = run(name, signal.SIG_IGN)
    assert (done.returncode, done.stderr) == (0, "") and "usage: python launch/" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_other_signals_during_imports_are_one_line(number):
    done = run("train", signal.default_int_handler, number)
    said = f"interrupted by {number.name}\n"
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", said)
