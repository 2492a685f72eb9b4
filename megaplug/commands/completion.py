"""What can stand where the Tab key was pressed; composes nothing, since a person waits for it.

The shells call ``<program> --complete <word so far> <words before it ...>`` and read a proposal a line, with
its meaning after a tab; a line ``:files`` asks them for their own file names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from megaplug.commands.help import FLAGS
from megaplug.errors import UserError
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, group_options
from megaplug.job.conf_text import default_options
from megaplug.job.describe import KeyInfo, describe_section, option_header
from megaplug.job.megatron_table import load_table
from megaplug.job.suggest import did_you_mean
from megaplug.layers.registry.builtin import ATTENTIONS

SHELLS = ("bash", "fish", "zsh")
# In the place of proposals: the shell's own file names.
FILES = ":files"
_OF_FLAGS = {"--cfg": ("job",), "-c": ("job",), "--completion": SHELLS}
_FOLDERS = ("--config-dir", "-cd")
_ASKING = ("--help", "-h")

Proposal = tuple[str, str]


def script(shell: str) -> str:
    """The text that makes a shell complete our commands.

    Raises:
        UserError: There is none for that shell.
    """
    if shell not in SHELLS:
        raise UserError(f"there is no completion for {shell!r}", hint=did_you_mean(shell, SHELLS))
    return Path(__file__).with_name(f"completion.{shell}").read_text(encoding="utf-8").rstrip()


def answer(
    words: Sequence[str], own: Mapping[str, Sequence[str]] | None = None, *, takes_job: bool = True
) -> str:
    """The lines that a shell reads.

    Args:
        words: What has been typed of the word at the cursor, then the words before it.
        own: Keys of the command that are no keys of a job, with their values.
        takes_job: Whether it takes those of a job, too.
    """
    word, *before = words or [""]
    proposed = propose(word, before, own or {}) if takes_job else _propose_own(word, before, own or {})
    found = [
        (value, meaning)
        for value, meaning in proposed
        if value == FILES or (value.startswith(word) and (value != word or not word.endswith(".")))
    ]
    return "\n".join(f"{value}\t{meaning.partition('. ')[0]}".rstrip() for value, meaning in found)


def propose(word: str, before: Sequence[str], own: Mapping[str, Sequence[str]]) -> Iterator[Proposal]:
    """What could stand there, with its meaning; what does not begin with ``word`` may be among it."""
    source, last = _source(before), before[-1] if before else ""
    groups = group_options(source)
    if last in _FOLDERS:
        yield FILES, ""
    elif last in _OF_FLAGS:
        yield from ((value, "") for value in _OF_FLAGS[last])
    elif any(flag in before for flag in _ASKING):
        yield from _explainable(word, groups, source)
    elif word.startswith("-"):
        for left, meaning in FLAGS:
            names = left.partition(" [")[0].split(", ")
            yield from ((name.split()[0], meaning) for name in names if name.startswith("--"))
    elif "=" in word:
        yield from _values(word, before, groups, source, own)
    elif word.partition(".")[0] in keys.sections() and "." in word:
        yield from _keys_of(word.partition(".")[0], before, source)
        if word.startswith("attention.params."):
            yield from _parameters(before, source)
    elif word.startswith("megatron."):
        table = load_table().values()
        yield from ((f"megatron.{argument.dest}=", argument.help) for argument in table)
    else:
        yield from ((f"{key}=", "") for key in own)
        yield from ((f"{group}=", f"one of {', '.join(options[:6])}") for group, options in groups.items())
        yield from ((f"{section}.", "its keys") for section in keys.sections())
        yield from (
            (f"{info.key}=", info.meaning) for info in describe_section("", source) if not info.is_open
        )
        yield "megatron.", "any other argument of Megatron-LM"


def _propose_own(word: str, before: Sequence[str], own: Mapping[str, Sequence[str]]) -> Iterator[Proposal]:
    """What could stand there of a command that takes no job."""
    key = word.partition("=")[0]
    if before and before[-1] in _OF_FLAGS:
        yield from ((value, "") for value in _OF_FLAGS[before[-1]])
    elif any(flag in before for flag in _ASKING):
        yield from ((name, "") for name in own)
    elif word.startswith("-"):
        yield from ((flag, "") for flag in ("--help", "--completion", "--version"))
    elif "=" in word:
        yield from ((value if value == FILES else f"{key}={value}", "") for value in own.get(key, ()))
    else:
        yield from ((f"{name}=", "") for name in own)


def _values(
    word: str,
    before: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    source: ConfigSource,
    own: Mapping[str, Sequence[str]],
) -> Iterator[Proposal]:
    key, _, typed = word.partition("=")
    # Of several values, such as topology=tp2,pp2, the last is completed.
    head = typed[: typed.rfind(",") + 1]
    if key in own:
        values: Iterable[Proposal] = ((value, "") for value in own[key])
    elif key in groups:
        values = ((option, option_header(key, option, source)) for option in groups[key])
    else:
        values = ((value, "") for value in _values_of(key, before, source))
    for value, meaning in values:
        yield (value if value == FILES else f"{key}={head}{value}"), meaning


def _values_of(key: str, before: Sequence[str], source: ConfigSource) -> Sequence[str]:
    section, _, name = key.rpartition(".")
    if section == "megatron":
        argument = load_table().get(name)
        if argument is None:
            return ()
        return ("true", "false") if argument.is_switch else [str(choice) for choice in argument.choices or ()]
    if section == "attention.params":
        return next((values for found, values in _plugin_parameters(before, source) if found == name), ())
    if section and section not in keys.sections():
        return ()
    info = next((info for info in describe_section(section, source) if info.name == name), None)
    return () if info is None else _values_of_key(info)


def _values_of_key(info: KeyInfo) -> Sequence[str]:
    if info.name in ("load", "runs_dir", "path") or info.name.endswith(("_path", "_dir")):
        return (FILES,)
    values = [*info.choices, *(("true", "false") if info.type.startswith("true or false") else ())]
    return [*values, "null"] if values and info.type.endswith("or null") else values


def _keys_of(section: str, before: Sequence[str], source: ConfigSource) -> Iterator[Proposal]:
    for info in describe_section(section, source):
        yield (f"{info.key}." if info.is_open else f"{info.key}="), info.meaning


def _parameters(before: Sequence[str], source: ConfigSource) -> Iterator[Proposal]:
    yield from ((f"attention.params.{name}=", "") for name, _ in _plugin_parameters(before, source))


def _plugin_parameters(before: Sequence[str], source: ConfigSource) -> list[tuple[str, Sequence[str]]]:
    """The parameters of the attention that has been typed, or that stands by default, with their choices."""
    typed = dict(word.split("=", 1) for word in before if "=" in word)
    chosen = typed.get("attention", default_options(source.folders, source.name).get("attention"))
    name = typed.get("attention.name", chosen)
    return [
        (parameter, [str(choice) for choice in declared.choices])
        for plugin in ATTENTIONS
        if plugin.name == name
        for parameter, declared in plugin.parameters.items()
    ]


def _explainable(word: str, groups: Mapping[str, Sequence[str]], source: ConfigSource) -> Iterator[Proposal]:
    section = word.partition(".")[0]
    if "." in word and section in keys.sections():
        yield from ((info.key, info.meaning) for info in describe_section(section, source))
    elif word.startswith("megatron."):
        yield from ((f"megatron.{argument.dest}", argument.help) for argument in load_table().values())
    else:
        yield from ((name, "") for name in dict.fromkeys([*groups, *keys.sections()]))
        yield from ((info.key, info.meaning) for info in describe_section("", source))


def _source(before: Sequence[str]) -> ConfigSource:
    """Where configuration is read from, if a folder was typed that is there."""
    folders = [Path(folder).expanduser() for flag, folder in pairwise(before) if flag in _FOLDERS]
    return ConfigSource(extra_dir=next((folder for folder in folders if folder.is_dir()), None))
