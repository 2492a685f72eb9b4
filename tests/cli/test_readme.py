"""Every message in the README is what is answered, and its tree is there; test_docs.py tries its commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [
    line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")
]
MESSAGES = re.findall(r"^\| `(python launch/[^`]+)` \| (.+?) \|$", README, re.MULTILINE)


def run(words, cwd):
    """A command as typed from the clone, but what it writes goes elsewhere."""
    program = [sys.executable, str(ROOT / words[1])]
    return subprocess.run([*program, *words[2:]], cwd=cwd, capture_output=True, text=True, timeout=180)


def test_the_readme_has_the_commands_that_train_and_test():
    assert {"make train", "make test"} <= set(COMMANDS)
    assert MESSAGES


@pytest.mark.parametrize(("command", "answer"), MESSAGES)
def test_a_mistake_of_the_readme_is_answered_as_it_says(command, answer, tmp_path):
    done = run(shlex.split(command), tmp_path)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert answer.replace("`", "") in done.stderr
    assert "Traceback" not in done.stderr


def test_the_tree_of_the_readme_is_the_tree_that_is_there():
    (tree,) = (block for block in blocks("text") if block.startswith("launch/"))
    parent = ""
    shown = set()
    for line in tree.splitlines():
        name = line.split()[0]
        path = f"{parent}{name}" if line.startswith("  ") else name
        parent = name if not line.startswith("  ") else parent
        shown.add(path)
        assert (ROOT / path).exists() or (ROOT / path.rstrip("/")).with_suffix(".py").exists(), path
    rooms = {f"megaplug/{folder.parent.name}/" for folder in (ROOT / "megaplug").glob("*/__init__.py")}
    assert rooms <= shown
