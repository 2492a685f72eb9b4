"""Renews the planner's answers in README.md and docs: ``python -m megaplug.commands.planner_page``.

Every block of text that follows a block with a command of ``launch/plan.py`` is what that command answers on
a machine without Apex and Transformer Engine, whichever machine renews it; a test compares them.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from megaplug.commands import cli, plan
from megaplug.job.compose import conf_dir
from megaplug.job.packages import MODULES
from megaplug.runs.atomic import write_text_atomic

RENEW = "python -m megaplug.commands.planner_page"
_EXAMPLE = re.compile(
    # Neither the words nor the answer run on into the next block.
    r"(^```bash\n(?:# [^\n]*\n)?python launch/plan\.py(?P<words>(?:(?!```).)*)\n```\n\n```text\n)"
    r"(?:(?!```).)*(^```\n)",
    re.DOTALL | re.MULTILINE,
)


def page_files() -> list[Path]:
    """Where such answers stand in a clone."""
    root = conf_dir().parent
    return [root / "README.md", root / "docs" / "planner.md"]


def renewed(text: str) -> str:
    """The page with the answers of today."""
    return _EXAMPLE.sub(lambda found: f"{found[1]}{_answer(found['words'])}{found[3]}", text)


def _answer(words: str) -> str:
    """What the command writes, its errors after the rest."""
    said, errors, name = io.StringIO(), io.StringIO(), sys.argv[0]
    sys.argv[0] = "launch/plan.py"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), _without_packages():
            plan.main(shlex.split(words.replace("\\\n", " ")))
    finally:
        sys.argv[0] = name
    text = "\n".join(part.strip("\n") for part in (said.getvalue(), errors.getvalue()) if part.strip())
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@contextlib.contextmanager
def _without_packages() -> Iterator[None]:
    """The optional packages are not found: what a machine has of them changes kernels and so figures."""
    names = [name for modules in MODULES.values() for name in modules]
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    # A module that is None is none, to import and to find_spec.
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def main() -> int:
    """Write the page; returns the exit code."""

    def write() -> int:
        for file in page_files():
            write_text_atomic(file, renewed(file.read_text(encoding="utf-8")))
            print(f"wrote {file}")
        return 0

    return cli.guarded(write)


if __name__ == "__main__":
    sys.exit(main())
