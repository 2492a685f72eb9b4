"""What ``--help`` and ``--version`` say, from the same descriptions as docs/keys.md; composes nothing."""

from __future__ import annotations

import json
import platform
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata

import megaplug
from megaplug.commands.cli import CommandLine
from megaplug.commands.help_parameters import parameter_rows
from megaplug.errors import UserError
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, group_options
from megaplug.job.conf_text import default_options
from megaplug.job.describe import KeyInfo, as_json, describe_keys, describe_section, option_header
from megaplug.job.megatron_table import load_table
from megaplug.job.names import argument_keys
from megaplug.job.parameters import PARAMS, parameter_meant
from megaplug.job.suggest import did_you_mean

# What most commands change; the rest is a --help <group> away.
MOST_USED = (
    "name", "resume", "load", "device",
    "data.path", "model.seq_length",
    "train.iters", "train.tokens", "train.micro_batch_size", "train.global_batch_size", "train.stop_at",
    "lr.lr", "topology.tp", "topology.pp", "topology.dp", "checkpoint.save_interval",
)  # fmt: skip

FLAGS = (
    ("-h, --help [NAME ...]", "this page, or what a group or a key means, such as --help lr train.tokens"),
    ("--help --json", "every key with type, default, choices and meaning, for a program"),
    ("--cfg job", "print the composed configuration and stop (--resolve: without references)"),
    ("--multirun", "run every combination of values that can be, such as topology=tp2,pp2 train.seed=1,2"),
    ("--job FILE", "start the job.yaml in a run's folder as it was frozen; beside it only words of launch"),
    ("--config-dir DIR", "a folder of your own, laid beside the shipped one"),
    ("--config-name NAME", "another primary file than train"),
    ("--completion SHELL", "the completion of bash, zsh or fish, to be read by it"),
    ("--version", "the versions of megaplug, Megatron-core and torch"),
)
_WIDTHS = (60, 110)
_INDENT = "  "


def help_text(command: CommandLine, own_page: Callable[[], str]) -> str:
    """The answer to ``--help``, with or without names after it.

    Args:
        command: Its ``overrides`` name groups and keys; it also tells where to look for groups.
        own_page: What is shown where nothing is named.

    Raises:
        UserError: Something was named that is neither a group nor a key.
    """
    if command.json:
        groups = group_options(command.source)
        return json.dumps({"groups": groups, "keys": as_json(describe_keys(command.source))}, indent=2)
    if not command.overrides:
        return own_page()
    return "\n\n".join(explain(word.lstrip("+~"), command.source) for word in command.overrides)


def version_text() -> str:
    """What runs here, without importing it."""
    packages = ["megatron-core", "torch", "hydra-core"]
    known = {found.metadata["Name"].lower() for found in metadata.distributions()}
    versions = [f"{name} {metadata.version(name) if name in known else 'not installed'}" for name in packages]
    return f"megaplug {megaplug.__version__} (Python {platform.python_version()}, {', '.join(versions)})"


def explain(name: str, source: ConfigSource) -> str:
    """What a group, an option of one, a key, or an argument of Megatron's means.

    Args:
        name: ``lr``, ``lr=cosine``, ``lr.min_lr``, ``min_lr`` or ``megatron.<argument>``.
        source: Where to look for groups.

    Raises:
        UserError: There is no such thing.
    """
    name, _, option = name.partition("=")
    groups, infos = group_options(source), {info.key: info for info in describe_keys(source)}
    if option and option in groups.get(name, ()):
        return _wrapped(f"{name}={option}", option_header(name, option, source))
    if name in groups or name in keys.sections():
        return _explain_group(name, groups.get(name, []), source)
    if name in infos:
        of_plugins = _explain_parameters(name) if name == PARAMS else ""
        return "\n\n".join(filter(None, (_explain_key(infos[name]), of_plugins)))
    section, _, argument = name.partition(".")
    table = load_table()
    if section == "megatron" and argument in table:
        found = table[argument]
        flags = f"Megatron's {' '.join((*found.on, *found.off))}; its own default is {found.default}"
        key = argument_keys().get(argument)
        typed = [] if key is None else _paragraph(f"is set by {key}, not by {name}")
        return "\n".join([name, *_paragraph(found.help), *_paragraph(flags), *typed])
    by_leaf = [info for info in infos.values() if info.name == name]
    if by_leaf:
        return "\n\n".join(map(_explain_key, by_leaf))
    if parameters := _explain_parameters(name):
        return parameters
    if parameter := parameter_meant(name):
        raise UserError(f"there is no group or key {name!r}", hint=f"did you mean {parameter}?")
    meant = [
        *groups,
        *infos,
        *(info.name for info in infos.values()),
        *(f"megatron.{item}" for item in table),
    ]
    raise UserError(f"there is no group or key {name!r}", hint=did_you_mean(name, meant))


def front_page(command: CommandLine, purpose: str) -> str:
    """What ``launch/train.py --help`` shows: flags, groups with their options, the keys used most.

    Args:
        command: How it was called, and where to look for groups.
        purpose: What the command does, in a line.
    """
    source, program = command.source, command.program
    chosen = default_options(source.folders, source.name)
    usage = f"usage: {program} [flags] [group=option ...] [key=value ...]"
    lines = [*_paragraph(purpose, ""), "", *_paragraph(usage, ""), "", "flags:"]
    lines += _table(FLAGS)
    lines += ["", "groups and their options; * stands where nothing is typed:"]
    lines += _table(
        (group, ", ".join(f"{name}*" if chosen.get(group) == name else name for name in options))
        for group, options in group_options(source).items()
    )
    infos = {info.key: info for info in describe_keys(source)}
    lines += ["", f"keys used most, of {len(infos)}, with their defaults:"]
    most_used = [(f"{key}={infos[key].default}", infos[key].meaning.split(". ")[0]) for key in MOST_USED]
    lines += _table(most_used, one_line=True)
    lines += _table([("megatron.<argument>=<value>", "any other argument of Megatron-LM by its name")])
    rest = "all keys: --help <group>, for example --help train; docs/keys.md has them on one page"
    lines += ["", *_paragraph(rest, "")]
    return "\n".join(lines)


def _explain_group(group: str, options: Sequence[str], source: ConfigSource) -> str:
    chosen = default_options(source.folders, source.name).get(group)
    lines = []
    if options:
        lines += [f"{group}=<option>; * stands where nothing is typed:"]
        headers = [(name, option_header(group, name, source)) for name in options]
        lines += _table((f"{name}*" if name == chosen else name, header) for name, header in headers)
    if group in keys.sections():
        lines += ["", f"keys of {group}, with their defaults:"] if options else [f"keys of {group}:"]
        for info in describe_section(group, source):
            lines += ["", *(f"{_INDENT}{line}" for line in _explain_key(info).splitlines())]
    return "\n".join(lines)


def _explain_key(info: KeyInfo) -> str:
    lines = [f"{info.key}={info.default}", *_paragraph(info.meaning)]
    kind = " | ".join(info.choices) if info.choices else info.type
    if info.choices and info.type.endswith("or null"):
        kind += " | null"
    megatron = ""
    if info.argument:
        megatron = f"; Megatron's {info.argument}"
    elif info.following:
        megatron = f"; decides Megatron's {', '.join(info.following)}"
    return "\n".join([*lines, *_paragraph(f"{kind}{megatron}")])


def _explain_parameters(name: str) -> str:
    """Those of attentions: one of them, or all for the key that holds them; empty if it is none."""
    return "\n\n".join(
        "\n".join([title, *(line for text in texts for line in _paragraph(text))])
        for title, texts in parameter_rows(name)
    )


def _wrapped(title: str, text: str) -> str:
    return "\n".join([title, *_paragraph(text)])


def _paragraph(text: str, indent: str = _INDENT) -> list[str]:
    return textwrap.wrap(
        text, width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _table(rows: Iterable[tuple[str, str]], *, one_line: bool = False) -> list[str]:
    """Two columns; the right one is wrapped, or cut, and begins on its own line beside a long left one."""
    rows = list(rows)
    column = min(max((len(left) for left, _ in rows), default=0), 28)
    indent = " " * (column + 2 * len(_INDENT))
    lines = []
    for left, right in rows:
        if one_line:
            right = textwrap.shorten(right, width() - len(indent), placeholder=" ...")
        text = _paragraph(right, indent) or [""]
        if len(left) <= column:
            text[0] = f"{_INDENT}{left:<{column}}{_INDENT}{text[0].strip()}".rstrip()
        else:
            text.insert(0, f"{_INDENT}{left}")
        lines += text
    return lines


def width() -> int:
    """Columns of the terminal, within what can be read."""
    smallest, largest = _WIDTHS
    return min(largest, max(smallest, shutil.get_terminal_size((100, 24)).columns))
