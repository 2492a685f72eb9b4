from __future__ import annotations

from pathlib import Path

from megaplug.data.cache import cache_root
from megaplug.data.progress import PlainLines


def test_plain_lines_come_after_two_seconds_and_then_every_five():
    times = iter([0.0, 0.0, 0.0, 0.5, 1.9, 2.5, 4.0, 7.5, 7.6])
    lines: list[str] = []
    shown = PlainLines(lines.append, lambda: next(times))
    shown.stage("tokenizing", 2_000_000)
    for _ in range(6):
        shown.advance(250_000)
    assert lines == [
        "tokenizing: 38% of 2.0 MB, 0.3 MB/s, 4 s left",
        "tokenizing: 62% of 2.0 MB, 0.2 MB/s, 4 s left",
    ]


def test_the_cache_lies_where_it_is_told_else_where_xdg_says_else_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root(str(tmp_path / "own")) == tmp_path / "own"
    assert cache_root(None) == tmp_path / "xdg" / "megaplug" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "megaplug" / "data"
    assert cache_root("~/data") == Path(tmp_path) / "data"
