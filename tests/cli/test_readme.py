"""Every command in the README works as it stands there, and every message in it is what is answered."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# Whole commands that neither make nor launch/ runs, with the reason why they are taken on trust.
ON_TRUST: dict[str, str] = {}


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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command, tmp_path):
    if command in ON_TRUST:
        return
    words = shlex.split(command)
    if words[0] == "make":
        # -n: what it would do is planned from the Makefile, not done
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    elif words[:2] == ["python", "launch/train.py"]:
        planned = words if {"--cfg", "launch=print"} & set(words) else [*words, "launch=print"]
        done = run(planned, tmp_path)
    elif words[:2] == ["python", "launch/plan.py"]:
        done = run(words, tmp_path)
    else:
        pytest.fail(
            f"no test knows how to try {command!r}: teach this one, or name it in ON_TRUST with the reason"
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("command", "answer"), MESSAGES)
def test_a_mistake_of_the_readme_is_answered_as_it_says(command, answer, tmp_path):
    done = run(shlex.split(command), tmp_path)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert answer.replace("`", "") in done.stderr
    assert "Traceback" not in done.stderr


def test_words_in_running_text_are_keys_and_options_that_exist():
    from megaplug.job.compose import ConfigSource, group_options
    from megaplug.job.keys import is_known

    groups = group_options(ConfigSource())
    # `key=value` between backticks, outside of blocks
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    own = {"action", "output", "ARGS", "PYTHON"}
    mistakes = "\n".join(command for command, _ in MESSAGES)
    for span in re.findall(r"`([^`\n]+)`", text):
        if span in mistakes:
            continue
        for key, value in re.findall(r"([\w.]+)=(\S*)", span):
            options = groups.get(key)
            assert key in own or is_known(key) or options, f"{span!r}: there is no {key}"
            assert options is None or value in options, f"{span!r}: {key} has no {value}"


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
