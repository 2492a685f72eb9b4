"""Every command in README.md and docs/ works as it stands; ``document_commands.py`` says how it is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from document_commands import (
    ROOT,
    Command,
    commands,
    documents,
    make_clone,
    reader_environment,
    run_command,
    try_command,
)

from megaplug.commands.checkpoint_words import WORDS as CHECKPOINT_WORDS
from megaplug.commands.plan_words import WORDS
from megaplug.commands.prepare import OWN
from megaplug.commands.runs_words import WORDS as RUNS_WORDS
from megaplug.job.compose import ConfigSource, group_options
from megaplug.job.keys import is_known

DOCUMENTS = [document for document in documents() if any(commands(document.read_text()))]


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized text is shared by the documents and not left in the reader's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-of-documents"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_commands_of_a_document_are_understood(document: Path, tmp_path: Path, cache: None) -> None:
    clone = make_clone(tmp_path / "clone")
    wrong = {
        command.line: fault
        for command in commands(document.read_text())
        if (fault := try_command(command, clone))
    }
    assert wrong == {}
    assert not (clone / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_commands_of_a_document_run_in_their_order(document: Path, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone")
    env = reader_environment(tmp_path)
    for command in commands(document.read_text()):
        fault = run_command(command, clone, env)
        assert fault is None, f"{command.line}\n{fault}"


def test_words_in_running_text_are_keys_and_options_that_exist() -> None:
    groups = group_options(ConfigSource())
    own = {*OWN, *WORDS, *CHECKPOINT_WORDS, *RUNS_WORDS, "ARGS", "PYTHON", "key", "group"}
    for document in documents():
        # `key=value` between backticks, outside of blocks and of the table of mistakes
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"^\| `python launch/.*$", "", text, flags=re.MULTILINE)
        for span in re.findall(r"`([^`\n]+)`", text):
            for key, value in re.findall(r"(?<![\w-])([a-z][\w.]*|ARGS|PYTHON)=(\S*)", span):
                options = groups.get(key)
                where = f"{name_of(document)}: {span!r}"
                assert key in own or is_known(key) or options, f"{where}: there is no {key}"
                names = [name for name in value.split("|") if name and "<" not in name and "..." not in name]
                unknown = [name for name in names if options is not None and name not in options]
                assert not unknown, f"{where}: {key} has no {unknown}"


# What a document could say wrong.
WRONG = [
    "python launch/train.py train.itres=5",
    "python launch/train.py model=lama3_8b",
    "python launch/plan.py action=docter",
    "megaplug-train topolgy=tp2",
    "make trian",
    "pip install apex",
    "pip install 'megaplug[tee]'",
    "# needs a GPU\npython launch/train.py train.itres=5",
    "# ends with 2: it is said to be refused, and is not\npython launch/plan.py model=tiny",
    "# needs a GPU\npython launch/train.py model.num_layers=4 topology.pp=3",
    "# takes ten minutes\npython benchmarks/atention.py",
]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_found(line: str, tmp_path: Path, cache: None) -> None:
    (command,) = commands(f"```bash\n{line}\n```\n")
    assert try_command(command, make_clone(tmp_path / "clone"))


def test_a_command_that_fails_is_found(tmp_path: Path) -> None:
    clone, env = make_clone(tmp_path / "clone"), reader_environment(tmp_path)
    assert run_command(Command("ls runs/none | sort && false"), clone, env)
    assert run_command(Command("python launch/train.py --config-dir nowhere"), clone, env)
    assert run_command(Command("cat my/text/*.txt | wc -c > size && test -s size"), clone, env) is None
    assert (clone / "size").exists() and not (ROOT / "size").exists()


def test_marks_lines_and_blocks_are_read() -> None:
    text = "```bash\n# a note\npython a \\\n  b\n\n# needs a GPU\npython c\npython d\n```\n```text\nno\n```\n"
    assert [(found.line, found.needs) for found in commands(text)] == [
        ("python a    b", ""),
        ("python c", "a GPU"),
        ("python d", ""),
    ]


def test_what_a_machine_lacks_may_be_refused_by_name_only(tmp_path: Path, cache: None) -> None:
    clone = make_clone(tmp_path / "clone")
    line = "python launch/train.py backend=te device=cpu"
    assert try_command(Command(line), clone)
    assert try_command(Command(line, needs="Apex"), clone)
    assert try_command(Command(line, needs="a GPU"), clone) is None
