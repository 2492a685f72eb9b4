"""README.md and docs/planner.md show what the planner answers today."""

from __future__ import annotations

import pytest

from megaplug.commands import planner_page
from megaplug.job import packages


@pytest.mark.parametrize(("file", "answers"), list(zip(planner_page.page_files(), (1, 10), strict=True)))
def test_the_answers_of_a_page_are_those_of_today(file, answers):
    written = file.read_text()
    assert written.count("```text\n") >= answers
    assert written == planner_page.renewed(written), f"renew it: {planner_page.RENEW}"


def test_an_old_answer_is_replaced():
    command = "# ends with 2: no such thing\npython launch/plan.py action=plane"
    page = f"```bash\n{command}\n```\n\n```text\nold\n```\nend\n"
    assert "error: action=plane does not exist" in planner_page.renewed(page)
    assert "old" not in planner_page.renewed(page)
    assert planner_page.renewed(page).endswith("```\nend\n")


def test_a_command_without_an_answer_leaves_the_next_one_its_own():
    silent = "```bash\npython launch/plan.py action=doctor\n```\n\nwords\n\n"
    page = "```bash\npython launch/plan.py action=plane\n```\n\n```text\nold\n```\n"
    assert planner_page.renewed(silent + page) == silent + planner_page.renewed(page)


def test_a_page_is_the_same_on_a_machine_with_transformer_engine(tmp_path, monkeypatch):
    words = "model=llama3_8b cluster=h100 precision=bf16 topology.tp=8 topology.cp=2 attention=te"
    page = f"```bash\npython launch/plan.py {words}\n```\n\n```text\nold\n```\n"
    without = planner_page.renewed(page)
    assert "\nold\n" not in without and "this machine lacks transformer_engine" in without
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.is_installed("te")
    assert planner_page.renewed(page) == without
    assert packages.is_installed("te")
