from __future__ import annotations

import random
from fractions import Fraction

import pytest

from megaplug.data.split import borders, parse_split, pieces
from megaplug.errors import UserError
from megaplug.job.facts import SPLITS


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


@pytest.mark.parametrize("split", ["95,5,0", "1,1,1", "1,0,1", "1,0,0"])
def test_pieces_cover_every_token_once_in_order_and_fill_each_split_exactly(split):
    draw = random.Random(7)
    for _ in range(50):
        lengths = [draw.randint(1, 50) for _ in range(draw.randint(1, 30))]
        if sum(lengths) < 20:
            continue
        ends = borders(sum(lengths), parse_split(split))
        cut = list(pieces(lengths, ends))
        covered = [(p.document, t) for p in cut for t in range(p.start, p.stop)]
        assert covered == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
        for name, begin, end in zip(SPLITS, (0, *ends[:2]), ends, strict=True):
            assert sum(p.stop - p.start for p in cut if p.split == name) == end - begin
        assert all(p.stop > p.start for p in cut)


def test_one_document_alone_is_cut_in_two():
    cut = list(pieces([100], borders(100, parse_split("90,10,0"))))
    assert [(p.split, p.start, p.stop) for p in cut] == [("train", 0, 90), ("valid", 90, 100)]
