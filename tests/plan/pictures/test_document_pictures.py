"""The pictures in docs/pictures are what the command in docs/pictures.md still draws."""

from __future__ import annotations

import json
import re
import shlex
import struct
from pathlib import Path

import pytest

from megaplug.commands import plan

DOCS = Path(__file__).parents[3] / "docs"
COMMAND = re.search(r"^python launch/plan\.py (.*)$", (DOCS / "pictures.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The folder that the document's command fills."""
    assert COMMAND is not None
    folder = tmp_path_factory.mktemp("pictures")
    words = [
        f"pictures={folder}" if word.startswith("pictures=") else word for word in shlex.split(COMMAND[1])
    ]
    assert plan.main(words) == 0
    return folder


def size_of(png: Path) -> tuple[int, int]:
    return struct.unpack(">II", png.read_bytes()[16:24])


@pytest.mark.parametrize("name", ["memory", "timeline"])
def test_the_command_still_draws_the_picture(drawn, name):
    stored = DOCS / "pictures" / f"llama3_405b_{name}.png"
    assert stored.stat().st_size < 150_000
    assert size_of(stored) == size_of(drawn / f"{name}.png")


def test_the_stored_picture_is_not_out_of_date(drawn):
    """Bars within 5 % of what they are now: else draw it again with the document's command."""
    stored, now = (
        json.loads(path.read_text())
        for path in (DOCS / "pictures" / "llama3_405b_memory.json", drawn / "memory.json")
    )
    assert stored["job"] == now["job"]
    assert [stage["layers"] for stage in stored["stages"]] == [stage["layers"] for stage in now["stages"]]
    assert [stage["total_gib"] for stage in stored["stages"]] == pytest.approx(
        [stage["total_gib"] for stage in now["stages"]], rel=0.05
    )
