"""What tests of several commands start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import SMALL, prepared_corpus


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words for a little text, tokenized once."""
    return prepared_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def small_words(small_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words for a small job of four steps, whose run goes below the current folder."""
    monkeypatch.chdir(tmp_path)
    return [*SMALL, *small_corpus, "train.iters=4"]
