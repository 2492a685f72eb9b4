"""The words a person types after the command, checked before Hydra sees them.

Hydra says that a key is not in a struct; here it is said which key was probably meant, for all words at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megaplug.errors import Problem, UserError
from megaplug.job import keys
from megaplug.job.meant import PLAIN_HINT, option_hint, stray_hint
from megaplug.job.parameters import parameter_meant
from megaplug.job.suggest import closest, did_you_mean
from megaplug.job.sweep_values import sweep_problem, values

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override


# A run has exactly one of them.
LENGTHS = ("train.iters", "train.tokens", "train.epochs")


def parse(words: Sequence[str], groups: Mapping[str, Sequence[str]] | None = None) -> list[Override]:
    """Read ``key=value`` words with Hydra's grammar.

    Args:
        words: What was typed.
        groups: The options of every config group, for what a word without ``=`` may have meant.

    Raises:
        UserError: A word is not an override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    problems, parsed = [], []
    parser = OverridesParser.create()
    for word in words:
        if "=" not in word and not word.startswith("~"):
            problems.append(Problem("", f"{word!r} is no key=value", stray_hint(word, groups or {})))
            continue
        try:
            parsed.append(parser.parse_override(_quoted(word)))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem("", f"cannot read {word!r}: {reason}", _quoting_hint(word, parser)))
    if problems:
        raise UserError.from_problems(problems)
    return parsed


def _quoting_hint(word: str, parser: OverridesParser) -> str:
    """How a word is typed whose value holds what Hydra's grammar has a use for."""
    from hydra.errors import HydraException

    key, _, value = word.partition("=")
    for mark in (mark for mark in "\"'" if mark not in value):
        quoted = f"{key}={mark}{value}{mark}"
        try:
            parser.parse_override(quoted)
        except HydraException:
            continue
        return f"the value needs quotes, and these the shell's: {shlex.quote(quoted)}"
    return PLAIN_HINT


def _quoted(word: str) -> str:
    """Two keys are texts that Hydra's grammar takes for a sweep, a list or nothing: ``data.split=95,5,0``."""
    key, _, value = word.partition("=")
    split = key == "data.split" and value not in ("", "null")
    pattern = key == "moe.moe_layer_freq" and value.startswith(("(", "["))
    return f"{key}='{value}'" if (split or pattern) and not set(value) & set("'\"$\\") else word


def problems_of(
    overrides: Sequence[Override], groups: Mapping[str, Sequence[str]], *, intervals: bool = False
) -> list[Problem]:
    """Misspelt groups, options and keys.

    Args:
        overrides: What was typed.
        groups: The options of every config group that can be found.
        intervals: Whether a word may name all numbers of an interval.
    """
    found = (_problem_of(override, groups, intervals) for override in overrides)
    return [problem for problem in found if problem is not None]


def _problem_of(override: Override, groups: Mapping[str, Sequence[str]], intervals: bool) -> Problem | None:
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return Problem(
            key, "settings of Hydra itself cannot be changed", "write it into the command line flags"
        )
    is_option, is_sweep = key in groups and not override.is_delete(), override.is_sweep_override()
    if is_sweep and (is_option or keys.is_known(key)):
        problem = sweep_problem(override, groups, intervals=intervals)
        if problem is not None or override.is_interval_sweep():
            return problem
    if is_option:
        options = [value for value in _texts(override, groups) if value not in groups[key]]
        if options:
            wrong = options[0]
            return Problem(key, f"there is no option {wrong!r}", option_hint(key, wrong, groups[key]))
        return None
    if keys.is_known(key):
        if key in keys.sections():
            return Problem(key, "is a group of keys, not a value", did_you_mean(key, keys.section_keys(key)))
        return None
    return Problem(key, "there is no such key or group", _hint_for(key, groups))


def _texts(override: Override, groups: Mapping[str, Sequence[str]]) -> list[str]:
    value = override.value()
    if override.is_sweep_override():
        return values(override, groups)
    if isinstance(value, list):
        return [_text(item) for item in value]
    return [] if value is None else [_text(value)]


def _text(value: object) -> str:
    """As it was typed: the grammar has made a truth value of the option in ``profile=true``."""
    return str(value).lower() if isinstance(value, bool) or value in ("True", "False") else str(value)


def _hint_for(key: str, groups: Mapping[str, Sequence[str]]) -> str:
    """What a misspelt key may have meant: in its own group, elsewhere, or as an argument of Megatron."""
    section, _, leaf = key.partition(".")
    if parameter := parameter_meant(key):
        return f"did you mean {parameter}?"
    if leaf and section in keys.sections():
        match = closest(leaf, keys.section_keys(section))
        if match is not None:
            return f"did you mean {section}.{match}?"
    known = [*keys.all_keys(), *groups]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(keys.all_keys())}
    word = leaf or section
    if word in by_leaf:
        return f"did you mean {by_leaf[word]}?"
    from megaplug.job.megatron_table import load_table

    if (argument := word.lstrip("-").replace("-", "_")) in load_table():
        return f"an argument of Megatron's is written megatron.{argument}=..."
    near_leaf = by_leaf.get(closest(word, by_leaf) or "")
    if leaf and section in keys.sections():
        # Of a group that is there its own name is no help.
        elsewhere = f"did you mean {near_leaf}? " if near_leaf else ""
        return f"{elsewhere}--help {section} lists the keys of {section}"
    match = closest(key, known) or near_leaf
    if match is not None:
        return f"did you mean {match}?"
    if leaf and (group := closest(section, groups)) is not None:
        return f"did you mean the group {group}?"
    return "python launch/train.py --help lists groups and keys"


def for_hydra(overrides: Sequence[Override]) -> list[str]:
    """The same words, with keys of the open groups marked as ones that may be new.

    An option of a group that reads as a truth value (``profile=true``) is quoted: Hydra takes texts only.
    """
    words = []
    for override in overrides:
        line = override.input_line or ""
        if override.key_or_group in keys.sections() and isinstance(override.value(), bool):
            line = f"{line.partition('=')[0]}='{_text(override.value())}'"
        if _may_be_new(override) and not line.startswith(("+", "~")):
            line = f"++{line}"
        words.append(line)
    return words


def _may_be_new(override: Override) -> bool:
    """Whether what is given lies in an open group: one key of it, or several at once in braces."""
    key = override.key_or_group
    return keys.is_open(key) or (key in keys.OPEN_KEYS and isinstance(override.value(), dict))


def other_lengths_out(overrides: Sequence[Override]) -> list[str]:
    """Words that take out the lengths of a run that nobody typed, where one was typed.

    So ``train.tokens=1e6`` is enough, although the configs name a number of steps; two typed lengths are left
    to the checks, which refuse them.
    """
    typed = {override.key_or_group for override in overrides if override.value() is not None}
    if not typed & set(LENGTHS):
        return []
    return [f"{key}=null" for key in LENGTHS if key not in {o.key_or_group for o in overrides}]
