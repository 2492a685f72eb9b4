"""`make setup` finds a Python that fits or says what is missing; `.ci/run` hides no failure."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["bash", "env", "dirname", "basename", "cat", "sed", "ls", "sort", "tee"]
TOOLS += ["awk", "grep", "tail", "df", "tr", "timeout", "mkdir", "cp"]

# Answers what make-venv asks of a Python: whether it fits, whether it makes environments, and pip.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *version_info*) exit {fits} ;;
  *"venv, ensurepip"*) exit {makes_venvs} ;;
  *sys.executable*) echo "$0" ;;
  --version) echo "Python of a test" ;;
  "-c import pip") exit 0 ;;
  "-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip "*) printf '%s\\n' "  Downloading torch-9.9.whl (1 MB)" "Collecting noise" "ERROR: pip broke"
              exit {pip} ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """An empty machine: a PATH with the common tools, on which stand-ins for Python are put."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / ".ci", clone / ".ci")

    class Machine:
        def python(self, place, fits=True, makes_venvs=True, pip=0):
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STAND_IN.format(fits=int(not fits), makes_venvs=int(not makes_venvs), pip=pip))
            path.chmod(0o755)
            return path

        def tool(self, name, text):
            (tools / name).unlink(missing_ok=True)
            (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (tools / name).chmod(0o755)

        def run(self, *command, **variables):
            environment = {"PATH": str(tools), "HOME": str(tmp_path / "user")} | variables
            return subprocess.run(
                command, cwd=clone, env=environment, capture_output=True, text=True, timeout=60
            )

        def setup(self, wanted=""):
            return self.run(".ci/make-venv", ".venv", wanted)

    machine = Machine()
    machine.python("bin/python3", fits=False)  # as on most machines: there is one, and it is too old
    machine.clone = clone
    return machine


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3.12",
        "bin/python3.13",
        "user/.pyenv/versions/3.13.0/bin/python3",
        "user/.local/share/uv/python/cpython-3.12.4-linux/bin/python3",
    ],
)
def test_setup_finds_the_python_that_fits(machine, place):
    python = machine.python(place)
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert f"from {python}" in done.stdout
    assert (machine.clone / ".venv" / "bin" / "python").exists()
    assert "Downloading torch-9.9" in done.stdout
    assert "noise" not in done.stdout


def test_setup_passes_over_a_python_that_cannot_make_environments(machine):
    machine.python("bin/python3.12", makes_venvs=False)
    good = machine.python("bin/python3.13")
    assert f"from {good}" in machine.setup().stdout


def test_setup_says_what_is_missing(machine):
    nothing = machine.setup()
    assert nothing.returncode == 1
    assert "no Python 3.12 or 3.13 found" in nothing.stderr
    assert "make setup PYTHON=" in nothing.stderr
    machine.python("bin/python3.12", makes_venvs=False)
    lame = machine.setup()
    assert lame.returncode == 1
    assert "sudo apt install python3.12-venv" in lame.stderr
    named = machine.setup("python3")
    assert named.returncode == 1
    assert "'python3' is not a Python 3.12 or 3.13" in named.stderr


def test_setup_fails_when_pip_fails_and_shows_why(machine):
    machine.python("bin/python3.12", pip=7)
    done = machine.setup()
    assert done.returncode == 1
    assert "ERROR: pip broke" in done.stderr
    assert ".venv/install.log" in done.stderr


@pytest.mark.parametrize(
    ("broken", "code", "ran"),
    [
        ("none", 0, ["setup", "test", "lint", "slow"]),
        ("test", 3, ["setup", "test"]),
        ("slow", 3, ["setup", "test", "lint", "slow"]),
    ],
)
def test_ci_ends_with_the_exit_code_of_the_first_step_that_fails(machine, broken, code, ran):
    machine.tool("make", f'echo "$1" >> made; [ "$1" != {broken} ] || exit 3')
    done = machine.run(".ci/run")
    assert done.returncode == code
    assert (machine.clone / "made").read_text().split() == ran
    assert ("all passed" in done.stdout) == (code == 0)


def test_ci_ends_what_hangs(machine):
    machine.tool("make", '[ "$1" != test ] || tail -f /dev/null')
    done = machine.run(".ci/run", CI_BUDGET_S="1")
    assert done.returncode == 124
    assert "minutes are over" in done.stderr


def test_a_second_make_setup_does_nothing(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    stamp = tmp_path / ".venv" / ".megaplug-installed"
    stamp.parent.mkdir()
    stamp.touch()
    # What was typed for the make that runs this test is not meant for that one.
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    assert subprocess.run(["make", "-q", "setup"], cwd=tmp_path, env=env).returncode == 0
    os.utime(stamp, (1, 1))
    assert subprocess.run(["make", "-q", "setup"], cwd=tmp_path).returncode == 1
