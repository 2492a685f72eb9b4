"""Only hints that help: every override that a refused plan proposes makes a plan that is legal and fits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, compose_job
from megaplug.job.schema import Job

# Another question, such as action=search, is no override.
_WORD = re.compile(r"(?<![\w.])(?!action=)[a-z]\w*(?:\.\w+)*=(?:\[[^\]]*\]|[^\s,;|)]+)")
_NAMED = re.compile(rf"another |{_WORD.pattern}")
_EITHER = re.compile(r"  \|  |; or |, or | or |; ")


def overrides_in(text: str) -> list[list[str]]:
    """The overrides that a hint proposes, those of each alternative together."""
    return [found for part in _EITHER.split(text) if (found := _WORD.findall(part))]


def sound(problems: Iterable[Problem], works: Callable[[Sequence[str]], bool]) -> list[Problem]:
    """The problems, their hints without the alternatives after which there still is no plan.

    Args:
        problems: What is wrong, with hints that mend one rule each.
        works: Whether there is a plan with these overrides added to what was typed.
    """
    return [dataclasses.replace(problem, hint=_sound(problem.hint, works)) for problem in problems]


def _sound(hint: str, works: Callable[[Sequence[str]], bool]) -> str:
    parts = _EITHER.split(hint)
    kept = [part for part in parts if not (words := _WORD.findall(part)) or works(words)]
    if kept == parts:
        return hint
    # What was said of the alternatives together stands before the first.
    begin = "use " if parts[0].startswith("use ") and kept and _NAMED.match(kept[0]) else ""
    return begin + ", or ".join(kept)


def with_words(job: Job, typed: Sequence[str], source: ConfigSource, words: Sequence[str]) -> Job:
    """The job as it is after these words are added to what was typed.

    Raises:
        UserError: A word is none.
    """
    if any(key_of(word) not in keys.all_keys() for word in words):
        # An option of a group: only composing knows what stands in it.
        added = {key_of(word) for word in words}
        return compose_job([*(word for word in typed if key_of(word) not in added), *words], source)
    for word in words:
        section, _, name = key_of(word).rpartition(".")
        value = _read(word.partition("=")[2])
        if section:
            name, value = section, dataclasses.replace(getattr(job, section), **{name: value})
        job = dataclasses.replace(job, **{name: value})
    return job


def key_of(word: str) -> str:
    """The key or group of an override."""
    return word.partition("=")[0].lstrip("+~")


def _read(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{text!r} is no value") from error
