"""The batch script's template with its places filled in."""

from __future__ import annotations

import pytest

from megaplug.launchers.batch_script import rendered, template_file


def test_a_line_without_its_value_goes_and_one_with_several_comes_for_each():
    text = "first\n#SBATCH --a={{a}}\n#SBATCH --b={{b}}\nmore {{c|}} end{{d|}}"
    assert rendered(text, {"a": None, "b": ["1", "2"], "c": "x", "d": None}) == (
        "first\n#SBATCH --b=1\n#SBATCH --b=2\nmore x end"
    )
    assert rendered("more {{c|}} end", {"c": ()}) == "more end"


def test_a_paragraph_of_which_only_a_comment_is_left_goes_too():
    text = "first\n\n# of a\nuse {{a}}\n\nlast\n"
    assert rendered(text, {"a": ""}) == "first\n\nlast\n"
    assert rendered(text, {"a": "x"}) == "first\n\n# of a\nuse x\n\nlast\n"


def test_what_looks_like_a_place_in_a_value_is_none():
    assert rendered("{{a}} {{b|}}", {"a": "{{b|}} {{a}}", "b": "{{a}}"}) == "{{b|}} {{a}} {{a}}"


def test_a_place_that_nobody_knows_is_an_error():
    with pytest.raises(KeyError):
        rendered("{{stranger}}", {})


def test_the_template_is_where_it_is_looked_for():
    assert template_file().read_text().startswith("#!/usr/bin/env bash\n")
