from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from megaplug.data.build import _between
from megaplug.data.split import borders, parse_split, without
from megaplug.errors import UserError


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("95,5,0", (Fraction(19, 20), Fraction(1, 20), 0)),
        ("0.95, 0.05", (Fraction(19, 20), Fraction(1, 20), 0)),
        ("1", (1, 0, 0)),
        ("2,1,1", (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))),
    ],
)
def test_shares_are_exact_and_sum_to_one(text, shares):
    assert parse_split(text) == shares


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "90,-5,5", "0,1,0", "nan,1,0", "inf,1,0", "1/0,1"])
def test_a_bad_split_is_refused_with_the_key(text):
    with pytest.raises(UserError, match=r"data\.split"):
        parse_split(text)


def test_borders_lie_at_the_shares_and_an_unwanted_split_is_empty():
    assert borders(1000, parse_split("95,5,0")) == (950, 1000, 1000)
    assert borders(7, parse_split("1,0,1")) == (3, 3, 7)
    assert borders(5, parse_split("1,0,0")) == (5, 5, 5)


def test_a_share_that_rounds_to_no_token_is_refused():
    with pytest.raises(UserError, match=r"valid is to have 0\.5"):
        borders(100, parse_split("99,0.5,0.5"))


@pytest.mark.parametrize("split", ["95,5,0", "1,1,1", "0.1,99.8,0.1", "1,0,0"])
def test_splits_cover_every_token_once_in_order_and_are_filled_exactly(split):
    chance = random.Random(5)
    for _ in range(50):
        lengths = [chance.choice([1, 2, 3, 1000]) for _ in range(chance.randint(3, 40))] + [2000]
        # Documents lie in their raw files in any order.
        rows = [[number % 2, 10_000 * number, length] for number, length in enumerate(lengths)]
        ends = borders(sum(lengths), parse_split(split))
        wanted = [(row[0], row[1] + i) for row in rows for i in range(row[2])]
        covered: list[tuple[int, int]] = []
        for begin, end in zip((0, *ends[:2]), ends, strict=True):
            if end > begin:
                cut = _between(np.array(rows, dtype=np.int64), begin, end)
                assert cut[:, 2].min() > 0
                covered += [(int(file), int(first) + i) for file, first, size in cut for i in range(size)]
                assert len(covered) == end
        assert covered == wanted


def test_splits_with_sources_of_their_own_leave_their_share_to_the_others():
    assert without(parse_split("90,5,5"), ["valid"]) == (Fraction(90, 95), 0, Fraction(5, 95))
    assert without(parse_split("90,5,5"), ["valid", "test"]) == (1, 0, 0)
    assert without(parse_split("90,5,5"), []) == parse_split("90,5,5")
