"""What a word may have meant that is no override, names no option, or holds a comma."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megaplug.job import keys
from megaplug.job.counts import decimal_comma
from megaplug.job.parameters import is_list
from megaplug.job.suggest import closest, did_you_mean

_SIZES = re.compile(r"(?:(?:tp|pp|vpp|cp|dp|ep|etp)\d+_?)+")
_SIZE = re.compile(r"([a-z]+)(\d+)")
_ENDING = re.compile(r"[kmgbt]", re.IGNORECASE)
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")
_SOURCES = ("data.path", "data.valid_path", "data.test_path")
PLAIN_HINT = "write key=value, such as train.iters=100; quote values that hold special characters"


def stray_hint(word: str, groups: Mapping[str, Sequence[str]]) -> str:
    """What a word without ``=`` may have meant.

    Args:
        word: It.
        groups: The options of every config group.
    """
    if _ENDING.fullmatch(word):
        return f"a number and its ending are one word, such as tokens=1{word.upper()}"
    if keys.is_known(word) or word in groups:
        return f"it lacks its value: {word}=..."
    owners = [group for group, options in groups.items() if word in options]
    if owners:
        return "did you mean " + " or ".join(f"{group}={word}" for group in owners[:3]) + "?"
    near = closest(word, [option for options in groups.values() for option in options])
    if near is None:
        return PLAIN_HINT
    owner = next(group for group, options in groups.items() if near in options)
    return f"did you mean {owner}={near}? {PLAIN_HINT}"


def option_hint(group: str, wrong: str, options: Sequence[str]) -> str:
    """What an option that is not there may have meant."""
    if group == "topology" and _SIZES.fullmatch(wrong):
        typed = " ".join(f"topology.{name}={size}" for name, size in _SIZE.findall(wrong))
        return f"sizes can be typed: {typed}"
    few = 20
    hint = did_you_mean(wrong, options, show=few)
    if len(options) <= few:
        return hint
    return f"{hint} (--help {group} lists all)" if hint else f"--help {group} lists all {len(options)}"


def several_hint(key: str, value: str) -> str:
    """What to do about a value that Hydra reads as several, since it holds a comma or a call."""
    if key in _SOURCES:
        return (
            f"several sources are written '{key}=[{value}]'; launch/train.py --multirun makes a run of each"
        )
    rerun = "launch/train.py --multirun runs every one of them"
    if is_list(key):
        return f"a list is written '{key}=[{value}]'; or {rerun}"
    if _THOUSANDS.fullmatch(value):
        return f"thousands are not parted by commas: {key}={value.replace(',', '_')}; or {rerun}"
    if pointed := decimal_comma(value):
        return f"a decimal point is written, not a comma: {key}={pointed}; or {rerun}"
    return rerun
