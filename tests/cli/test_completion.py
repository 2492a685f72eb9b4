"""The Tab key in real shells: what is proposed, for installed commands and for ``python launch/train.py``."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megaplug.commands import completion
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, group_options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which ``python`` and ``megaplug-train`` are what they are for a reader."""
    programs = tmp_path_factory.mktemp("bin")
    for name, script in {"python": "", "megaplug-train": ROOT / "launch" / "train.py"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {script} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb"}


# Types a line and asks bash for its proposals as the Tab key does: words cut at COMP_WORDBREAKS.
BASH = r"""
set -e   # a shell that ends at the first failure must not end here
eval "$(python launch/train.py --completion bash)"
eval "$(python launch/train.py --completion bash)"   # twice is once
set +e
COMP_LINE=$1 COMP_POINT=${#1}
read -ra COMP_WORDS <<<"${1//=/ = }"
[[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
[[ $(complete -p "${COMP_WORDS[0]}") =~ -F\ ([^ ]+) ]] && "${BASH_REMATCH[1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


def bash(line: str, environment: dict[str, str], cwd: Path = ROOT, before: str = "") -> list[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", before + BASH, "bash", line],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("program", ["megaplug-train", "python launch/train.py", "python ./launch/train.py"])
def test_bash_completes_an_option_of_a_group(program: str, environment: dict[str, str]) -> None:
    # Readline replaces what stands behind the last = only.
    expected = [option for option in group_options(ConfigSource())["model"] if option.startswith("llama3")]
    assert bash(f"{program} topology=tp2 model=llama3", environment) == expected


@pytest.mark.parametrize(
    ("typed", "proposals"),
    [
        ("topo", ["topology=", "topology."]),
        ("lr.lr_d", ["lr.lr_decay_style=", "lr.lr_decay_iters="]),
        ("lr.lr_wsd_decay_style=mi", ["minus_sqrt"]),
        ("topology=tp2_c,tp2_pp2", ["tp2_c,tp2_pp2"]),
        ("topology.sequence_parallel=", ["true", "false", "null"]),
        ("load_st", ["load_state="]),
        ("--cfg ", ["job"]),
        ("--help lr.min", ["lr.min_lr"]),
        ("megatron.overlap_grad", ["megatron.overlap_grad_reduce="]),
        ("megatron.overlap_grad_reduce=t", ["true"]),
        ("attention=flash attention.params.", ["attention.params.cuda_kernel="]),
        ("nothing_like_it", []),
    ],
)
def test_bash_completes_keys_values_and_flags(
    typed: str, proposals: list[str], environment: dict[str, str]
) -> None:
    assert bash(f"megaplug-train {typed}", environment) == proposals


@pytest.mark.slow
def test_bash_proposes_every_key_group_and_section(environment: dict[str, str]) -> None:
    first = bash("megaplug-train ", environment)
    assert {f"{group}=" for group in group_options(ConfigSource())} <= set(first)
    for section in keys.sections():
        found = bash(f"megaplug-train {section}.", environment)
        assert [word.rstrip("=.") for word in found] == [
            f"{section}.{key}" for key in keys.section_keys(section)
        ]


def test_bash_completes_file_names_where_a_path_is_wanted(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "text.txt").touch()
    line = f"megaplug-train data.path={tmp_path}/te"
    assert sorted(bash(line, environment)) == [f"{tmp_path}/text.txt", f"{tmp_path}/texts"]


def test_bash_knows_an_own_folder(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# Mine.\ndefaults:\n  - tiny\n")
    assert bash(f"megaplug-train --config-dir {tmp_path} model=min", environment) == ["mine"]


def test_another_python_script_is_completed_as_before_and_is_not_run(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "other.py").write_text("open(__file__ + '.was_run', 'w')\n")
    before = "before() { COMPREPLY=(as_before); }; complete -F before python\n"
    assert bash(f"python {tmp_path}/other.py mod", environment, ROOT, before) == ["as_before"]
    assert bash(f"python {tmp_path}/other.py mod", environment) == []
    assert not (tmp_path / "other.py.was_run").exists()


def test_plan_completes_its_own_words(environment: dict[str, str]) -> None:
    assert {"plan", "doctor"} <= set(bash("python launch/plan.py action=", environment))
    assert bash("python launch/plan.py act", environment) == ["action="]
    assert bash("python launch/plan.py cluster=h1", environment) == ["h100"]


def test_a_proposal_takes_well_under_half_a_second_and_no_hydra() -> None:
    seconds = []
    for words in (["model=ll", "x"], ["topology."], ["megatron."], [""]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "launch/train.py", "--complete", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout and done.returncode == 0
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    # The work itself; the clock on the wall also counts what else the machine does.
    assert max(seconds) < 0.4
    code = "import sys, megaplug.commands.completion; print('hydra' in sys.modules, 'yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


def test_every_proposal_has_its_meaning() -> None:
    lines = completion.answer(["lr."]).splitlines()
    assert "lr.min_lr=\tLowest learning rate after the warm-up." in lines
    assert all("\t" in line for line in lines)


def test_a_shell_without_a_script_is_named() -> None:
    command = [sys.executable, "launch/train.py", "--completion", "bsh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "did you mean bash?" in done.stderr


# What zsh would list is printed by a stand-in for its compadd, whose last argument names the proposals.
ZSH = r"""
autoload -Uz compinit && compinit -u -d "$ZDOTDIR/dump"
source <(python launch/train.py --completion zsh)
compadd() { print -rl -- "${(@P)argv[-1]}"; }
words=(${(z)1}) CURRENT=$#words PREFIX=$words[-1]
[[ $words[1] == python ]] && _megaplug_python || _megaplug
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize("program", ["megaplug-train", "python launch/train.py"])
def test_zsh_completes(program: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH, "zsh", f"{program} topology=tp2 model=llama3"],
        cwd=ROOT,
        env={**environment, "ZDOTDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    expected = [option for option in group_options(ConfigSource())["model"] if option.startswith("llama3")]
    assert done.stdout.split() == [f"model={option}" for option in expected], done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("program", ["megaplug-train", "python launch/train.py"])
def test_fish_completes(program: str, environment: dict[str, str], tmp_path: Path) -> None:
    code = f"python launch/train.py --completion fish | source; complete -C '{program} lr.lr_d'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert sorted(found) == ["lr.lr_decay_iters=", "lr.lr_decay_style="], done.stderr
