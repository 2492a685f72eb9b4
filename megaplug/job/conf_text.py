"""The configuration files as a person reads them: what stands above a key, and the value as it is written.

Hydra and YAML are not asked: the answer is needed at every press of the Tab key, and both lose the comments.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

_KEY = re.compile(r"^(\w+):(?: +(.*?))?(?: +#.*)?$")
_ITEM = re.compile(r"^  - (?:(?:override +)?/?(\w+): *)?(\S+)$")


@dataclass(frozen=True)
class ConfText:
    """One file of ``conf/``.

    Attributes:
        header: What the file is, from the comment at its top; empty if the first key stands right below it.
        values: The value of every key of the outermost level, as written.
        comments: What stands above each of them.
        defaults: What the file is laid over: ``(group, option)``, with an empty group for its own.
    """

    header: str
    values: dict[str, str]
    comments: dict[str, str]
    defaults: tuple[tuple[str, str], ...]


@functools.cache
def read_conf(path: Path) -> ConfText:
    """Read one file; its comments as single lines.

    Raises:
        OSError: It cannot be read.
    """
    header, above = "", []
    values: dict[str, str] = {}
    comments: dict[str, str] = {}
    defaults: list[tuple[str, str]] = []
    in_defaults = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            if not line.startswith("# @package"):
                above.append(line.lstrip("# "))
            continue
        if line.startswith(" "):
            if in_defaults and (item := _ITEM.match(line)) and item[2] != "_self_":
                defaults.append((item[1] or "", item[2]))
            continue
        key = _KEY.match(line)
        in_defaults = key is not None and key[1] == "defaults"
        if key is not None and not in_defaults:
            values[key[1]] = (key[2] or "").strip("\"'")
            comments[key[1]] = " ".join(above)
        elif not values and not header:
            header = " ".join(above)
        above = []
    return ConfText(header, values, comments, tuple(defaults))


def find_option(folders: list[Path], group: str, option: str) -> Path | None:
    """The file of a group's option, in the first folder that has it."""
    files = (folder / group / f"{option}.yaml" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def default_options(folders: list[Path], primary: str) -> dict[str, str]:
    """The option of every group that is taken where nothing is typed."""
    files = [folder / f"{primary}.yaml" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    return {group: option for group, option in read_conf(file).defaults if group} if file is not None else {}


def option_text(folders: list[Path], group: str, option: str) -> ConfText:
    """An option together with those of its group that it is laid over, whose keys it inherits."""
    file = find_option(folders, group, option)
    if file is None:
        return ConfText("", {}, {}, ())
    own = read_conf(file)
    values: dict[str, str] = {}
    comments: dict[str, str] = {}
    for other, name in own.defaults:
        if not other and name != option:
            below = option_text(folders, group, name)
            values |= below.values
            comments |= below.comments
    return ConfText(own.header, values | own.values, comments | own.comments, own.defaults)
