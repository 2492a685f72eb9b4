from __future__ import annotations

import pytest

from megaplug.job.compose import ConfigSource, conf_dir, group_options
from megaplug.plan import models_page


@pytest.fixture(scope="module")
def page():
    return models_page.page()


@pytest.mark.slow
def test_the_page_of_models_is_current(page):
    written = (conf_dir().parent / "docs" / "models.md").read_text()
    assert written == page, f"docs/models.md is not current; renew it: {models_page.RENEW}"


def test_it_lists_every_model_with_its_true_size(page):
    assert page.count("\n| `") == len(group_options(ConfigSource())["model"])
    assert "| `llama3_8b` | 8,030,261,248 |  | 8,192 | 128,256 | Llama 3 8B as published |" in page
    assert "| `moe_30b` | 30,131,389,440 | 602,440,704 |" in page
