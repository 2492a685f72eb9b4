"""The forms of ``data.path``, ``data.valid_path`` and ``data.test_path``: one source or several.

::

    data.path=my/text                                       one
    data.path=[my/books:0.7,my/code:0.3]                    a list; without weights, each by its size
    data.path={books:my/books:0.7,code:my/code:0.3}         names of one's own
    data.path={books:{path:my/books,weight:0.7},code:{path:my/code,weight:0.3,text_key:body}}
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count
from pathlib import PurePath
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.job.schema import DataConfig

KEYS = ("path", "valid_path", "test_path")
"""The keys that name sources."""

_FIELDS = ("path", "weight", "text_key")
_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+))", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SourceSpec:
    """One source of text.

    Attributes:
        name: What its figures are called.
        path: Where it is.
        text_key: The key or column that holds the text.
        weight: Its share of the samples, in proportion to the others'; None for its share of the tokens.
    """

    name: str
    path: str
    text_key: str
    weight: Fraction | None = None


def sources(data: DataConfig, key: str = "path") -> list[SourceSpec]:
    """The sources that one of `KEYS` names; none if it is null.

    Raises:
        UserError: It has no known form, or weights that cannot be.
    """
    problems = list(_problems(data, key))
    if problems:
        raise UserError.from_problems(problems)
    return _read(data, key)


def source_problems(data: DataConfig) -> list[Problem]:
    """What is wrong with the form of the keys that name sources; nothing is looked for on the disk."""
    return [problem for key in KEYS for problem in _problems(data, key)]


def _read(data: DataConfig, key: str) -> list[SourceSpec]:
    value = getattr(data, key)
    if value is None:
        return []
    if isinstance(value, str):
        return [SourceSpec(_name_of(value), value, data.text_key)]
    if isinstance(value, Mapping):
        return [_spec(str(name), entry, data.text_key) for name, entry in value.items()]
    specs = [_spec("", entry, data.text_key) for entry in value]
    taken = {_name_of(spec.path) for spec in specs}
    free = set(taken)
    named = []
    for spec in specs:
        name = _name_of(spec.path)
        if name in free:
            free.remove(name)
        else:
            name = numbered(name, taken, 2)
        named.append(replace(spec, name=name))
    return named


def numbered(name: str, taken: set[str], first: int) -> str:
    """``<name>-<number>`` that is not taken, counted up from ``first``; it is taken from then on."""
    found = next(one for number in count(first) if (one := f"{name}-{number}") not in taken)
    taken.add(found)
    return found


def _spec(name: str, entry: Any, text_key: str) -> SourceSpec:
    if isinstance(entry, Mapping):
        weight = entry.get("weight")
        number = None if weight is None else Fraction(str(weight))
        return SourceSpec(name, entry["path"], entry.get("text_key", text_key), number)
    match = _WEIGHTED.fullmatch(entry)
    if match is None:
        return SourceSpec(name, entry, text_key)
    return SourceSpec(name, match["path"], text_key, Fraction(match["weight"]))


def _name_of(path: str) -> str:
    """The last part of a path without its endings, as far as it can be a name."""
    stem = PurePath(path).name.split(".", 1)[0] or PurePath(path).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "text"


def _problems(data: DataConfig, key: str) -> Iterator[Problem]:
    value, dotted = getattr(data, key), f"data.{key}"
    if value is None and key != "path":
        return
    if isinstance(value, str):
        return
    if not isinstance(value, Mapping | list | tuple) or not value:
        hint = f"a path, or several: {dotted}=[my/books:0.7,my/code:0.3]"
        yield Problem(dotted, f"{value!r} names no source", hint)
        return
    faults = list(_faults_of_entries(value, dotted))
    yield from faults
    if faults:
        return
    specs = _read(data, key)
    weights = [spec.weight for spec in specs if spec.weight is not None]
    if weights and len(weights) < len(specs):
        without = next(spec for spec in specs if spec.weight is None)
        yield Problem(
            dotted, f"{without.path} has no weight, but others have", "give all of them a weight, or none"
        )
    if (least := min(weights, default=1)) <= 0:
        hint = "give a number above 0, or leave the source out"
        yield Problem(dotted, f"a weight is {float(least):g}", hint)


def _faults_of_entries(value: Any, dotted: str) -> Iterator[Problem]:
    entries = value.items() if isinstance(value, Mapping) else enumerate(value)
    for name, entry in entries:
        where = f"{dotted}.{name}"
        if isinstance(value, Mapping) and not _NAME.fullmatch(str(name)):
            yield Problem(dotted, f"{str(name)!r} cannot be a name", "use letters, digits, dots, - and _")
        if isinstance(entry, str):
            continue
        if not (isinstance(entry, Mapping) and isinstance(value, Mapping)):
            yield Problem(where, f"{entry!r} is not a path", "write path:weight, such as my/books:0.7")
            continue
        unknown = sorted(str(field) for field in entry if field not in _FIELDS)
        if unknown:
            yield Problem(where, f"there is no key {unknown[0]!r}", f"known: {', '.join(_FIELDS)}")
        if not isinstance(entry.get("path"), str):
            yield Problem(where, "its path is not given", f"{where}.path=...")
        if not isinstance(entry.get("text_key", ""), str):
            yield Problem(f"{where}.text_key", f"{entry['text_key']!r} is not a text")
        weight = entry.get("weight")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if weight is not None and not (is_number and weight > 0):
            yield Problem(f"{where}.weight", f"must be a number above 0, but is {weight!r}")
