"""Kendall's tau and regret against cases worked out by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks.published.ranking import kendall_tau, regret


def test_tau_is_one_for_the_same_order_and_minus_one_for_the_opposite():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 21, 400]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1


def test_tau_by_hand():
    """Of six pairs, (3, 4) and (1, 2) of the measured order are swapped: (4 - 2) / 6."""
    assert kendall_tau([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 / 3)


def test_equal_values_count_for_neither_order():
    """Pairs of 1 1 2 against 5 6 7: one equal among the predicted, two in order: 2 / sqrt(2 x 3)."""
    assert kendall_tau([1, 1, 2], [5, 6, 7]) == pytest.approx(2 / math.sqrt(6))


def test_tau_is_none_where_there_is_no_order():
    assert kendall_tau([1], [1]) is None
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None


def test_regret_is_what_the_predicted_best_takes_longer_than_the_best():
    """The second is predicted best and takes 12 s, where 10 s were to be had."""
    assert regret([3.0, 1.0, 2.0], [10.0, 12.0, 15.0]) == pytest.approx(0.2)
    assert regret([1.0, 3.0, 2.0], [10.0, 12.0, 15.0]) == 0


def test_of_several_predicted_best_the_slowest_is_picked():
    assert regret([1.0, 1.0, 2.0], [10.0, 13.0, 9.0]) == pytest.approx(13 / 9 - 1)


def test_what_cannot_be_ranked_is_an_error():
    with pytest.raises(ValueError, match="2 predictions for 3"):
        kendall_tau([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="nothing to choose"):
        regret([], [])
