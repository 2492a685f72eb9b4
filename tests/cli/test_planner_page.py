"""docs/planner.md shows what its commands answer today."""

from __future__ import annotations

from megaplug.commands import planner_page


def test_the_answers_of_the_page_are_those_of_today():
    written = planner_page.page_file().read_text()
    assert written.count("```text\n") >= 10
    assert written == planner_page.renewed(written), f"renew it: {planner_page.RENEW}"


def test_an_old_answer_is_replaced():
    command = "# ends with 2: no such thing\npython launch/plan.py action=plane"
    page = f"```bash\n{command}\n```\n\n```text\nold\n```\nend\n"
    assert "error: action=plane does not exist" in planner_page.renewed(page)
    assert "old" not in planner_page.renewed(page)
    assert planner_page.renewed(page).endswith("```\nend\n")
