"""``launch/plan.py``: questions about a machine or a job, answered before anything is started."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from megaplug.commands import cli
from megaplug.commands.hints import key_of
from megaplug.commands.plan_words import OUTPUTS, WORDS, Asked, choose, split_words
from megaplug.errors import UserError
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, compose_job, group_options
from megaplug.job.keys import is_known
from megaplug.job.schema import Job
from megaplug.job.suggest import closest
from megaplug.plan.plan_json import error_json

_HELP = """\
What a job needs and whether it can exist, before anything is started. Nothing is run, no GPU is needed.

usage: {program} [action=NAME] [group=option ...] [key=value ...]

actions:
{actions}

words of these actions:
{words}

flags:
  -h, --help [NAME ..] this page; the words of a plan (--help plan), a group or key (--help cluster)
  --config-dir DIR     a folder of your own, laid beside the shipped one
  --completion SHELL   the completion of bash, zsh or fish, to be read by it
  --version            the versions of megaplug, Megatron-core and torch

examples:
  what does it cost?     {program} model=llama3_8b cluster=h100 precision=bf16 train=pretrain \\
                           topology=tp4_pp2 topology.dp=8 tokens=1T cluster.price_per_gpu_hour=2.5
  what is the best?      {program} action=search model=llama3_8b cluster=h100 precision=bf16 \\
                           train=pretrain topology.world_size=64
  is the plan right?     {program} action=rehearse model=llama3_8b topology=tp4_pp2 precision=bf16 ranks=0

The job is named as for launch/train.py, whose --help lists all groups and keys. `cluster` names the
machines. How many GPUs: topology.world_size is what the job takes (plan: it follows from tp, pp, cp and dp);
cluster.num_gpus is what there is, and no job is larger. Where nothing is said, numbers are fp32 and a step
has 8 sequences, for trying things out: GPUs train with precision=bf16 train=pretrain.
Ends with 0 if the job works, with 2 and the nearest that works if it is impossible."""


_FLAGS = "--help, --config-dir, --config-name, --completion, --version"


@dataclass(frozen=True)
class Action:
    """A question that can be asked.

    Attributes:
        module: Has ``answer(asked: Asked) -> int``, which returns the exit code.
        meaning: For ``--help``.
        words: Its own words, beside ``output``.
        needs_job: False where the plain default will do if nothing is typed: then nothing is composed.
    """

    module: str
    meaning: str
    words: tuple[str, ...] = ()
    needs_job: bool = True


ACTIONS: dict[str, Action] = {
    "plan": Action(
        "megaplug.commands.plan_job",
        "parameters, memory of every stage, step time, days and money of a job (the default)",
        ("tokens", "ranks", "pictures"),
    ),
    "rehearse": Action(
        "megaplug.commands.plan_rehearse",
        "chosen ranks of the real model without numbers: memory, FLOPs and bytes, beside the plan's",
        ("ranks",),
    ),
    "search": Action(
        "megaplug.commands.plan_search",
        "the best topologies of a model on a cluster, with what reproduces each; typed sizes stay",
        ("top", "tokens"),
    ),
    "doctor": Action(
        "megaplug.commands.plan_doctor",
        "what this machine has, what is wrong and the cure; ends with 1 if it cannot train",
        needs_job=False,
    ),
}
"""Every action by its name; ``plan`` is the default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Answers one question.

    Args:
        argv: The words after the command; the process's own if not given.

    Returns:
        The exit code: 0 for a good answer, 1 for a machine that cannot train, 2 if the question was wrong
        or its job is impossible.
    """
    return cli.run(lambda words: cli.answered(words, _answer, error_json), argv)


def _answer(words: Sequence[str]) -> int:
    if (code := cli.complete(words, _completed())) is not None:
        return code
    command = cli.parse(words, cli.program_name("megaplug-plan"), flags=_FLAGS)
    if command.help and command.overrides and not command.json:
        return cli.show("\n\n".join(_explained(name, command.source) for name in command.overrides))
    if (code := cli.inform(command, lambda: help_page(command.program))) is not None:
        return code
    if command.cfg is not None or command.resolve:
        hint = "python launch/train.py --cfg job shows the configuration of the same words"
        raise UserError("--cfg and --resolve are flags of launch/train.py", hint=hint)
    if command.multirun:
        hint = "one plan answers one command; action=search compares layouts"
        raise UserError("--multirun is a flag of launch/train.py", hint=hint)
    typed, rest = split_words(command.overrides, ("action", *WORDS))
    name = choose("action", typed.pop("action", "plan"), tuple(ACTIONS))
    action = ACTIONS[name]
    choose("output", typed.get("output", "table"), OUTPUTS)
    if strange := [word for word in typed if word not in ("output", *action.words)]:
        takers = [f"action={other}" for other, found in ACTIONS.items() if strange[0] in found.words]
        hint = f"it belongs to {' and '.join(takers)}" if takers else "see --help"
        raise UserError(f"{strange[0]}=... means nothing to action={name}", hint=hint)
    _misspelt(rest, command.source)
    # Without further words the doctor composes nothing: it answers where Hydra is missing, too.
    job = compose_job(rest, command.source) if rest or action.needs_job else Job()
    answer = cast(Callable[[Asked], int], importlib.import_module(action.module).answer)
    return answer(Asked(job, typed, command))


def _misspelt(words: Sequence[str], source: ConfigSource) -> None:
    """Words that are no job's and were meant to be of this command."""
    groups = group_options(source)
    for word in words:
        if word in ACTIONS:
            raise UserError(f"{word!r} is no key=value", hint=f"did you mean action={word}?")
        key = word.partition("=")[0]
        meant = closest(key, ("action", *WORDS))
        if meant and "." not in key and not is_known(key) and key not in groups:
            raise UserError(f"{key}: there is no such word, key or group", hint=f"did you mean {meant}?")


def _explained(name: str, source: ConfigSource) -> str:
    """What a word of this command means, and what a group or key of a job does; the word comes first."""
    from megaplug.commands.help import explain

    word = key_of(name)
    if name.split("=")[-1] in ACTIONS:
        return action_page(name.split("=")[-1])
    if word != "action" and word not in WORDS:
        meant = closest(word, ("action", *WORDS))
        if meant and closest(word, [meant, *keys.all_keys(), *group_options(source), *_leaves()]) == meant:
            raise UserError(f"there is no word, group or key {word!r}", hint=f"did you mean {meant}?")
        return explain(word if name == word else name.lstrip("+~"), source)
    if word == "action":
        return "\n".join(["action=NAME", _table([(other, one.meaning) for other, one in ACTIONS.items()])])
    takers = [other for other, action in ACTIONS.items() if word in action.words]
    of = f" (action={', action='.join(takers)})" if takers else ""
    own = f"{WORDS[word].form}\n  {WORDS[word].meaning}{of}"
    return f"{own}\n\n{explain(word, source)}" if word in _leaves() else own


def _leaves() -> set[str]:
    """The names of all keys without their groups."""
    return {key.rpartition(".")[2] for key in keys.all_keys()}


def help_page(program: str) -> str:
    """What ``--help`` alone shows."""
    used = ["output", *dict.fromkeys(word for action in ACTIONS.values() for word in action.words)]
    return _HELP.format(
        program=program,
        actions=_table([(name, action.meaning) for name, action in ACTIONS.items()]),
        words=_table([(WORDS[word].form, WORDS[word].meaning) for word in used]),
    )


def action_page(name: str) -> str:
    """What ``--help plan`` shows: an action's words, and of a plan what its own words mean."""
    action = ACTIONS[name]
    words = _table([(WORDS[word].form, WORDS[word].meaning) for word in ("output", *action.words)])
    lines = [f"action={name}: {action.meaning}", "", words]
    if name == "plan":
        from megaplug.plan.glossary import GLOSSARY

        lines += ["", "what its words mean:", _table(GLOSSARY)]
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns; what is too long for a line goes on below."""
    lines: list[str] = []
    for left, right in rows:
        begin = f"  {left:<21}"
        if not begin.endswith(" "):
            lines, begin = [*lines, begin], " " * 23
        wrapped = textwrap.wrap(right, 110 - 23, break_on_hyphens=False)
        lines += [f"{begin}{wrapped[0]}", *(" " * 23 + line for line in wrapped[1:])]
    return "\n".join(lines)


def _completed() -> dict[str, tuple[str, ...]]:
    """This command's own keys with their values, for a shell that completes."""
    used = dict.fromkeys(word for action in ACTIONS.values() for word in action.words)
    return {"action": tuple(ACTIONS), "output": OUTPUTS} | {word: WORDS[word].values for word in used}
