"""A run that gets no better is known by its own validations."""

from __future__ import annotations

import pytest

from megaplug.runs.early_stop import has_stopped, plateau_of


def lines(*losses: float | None) -> list[dict]:
    """Training steps and a validation every tenth, with what must not count among them."""
    found: list[dict] = []
    for number, loss in enumerate(losses, 1):
        found.append({"iteration": 10 * number, "loss": 0.1})
        found.append({"iteration": 10 * number, "valid_loss": loss, "split": "valid"})
        found.append({"iteration": 10 * number, "valid_loss": 0.0, "split": "valid", "source": "a"})
        found.append({"iteration": 10 * number, "valid_loss": 0.0, "split": "test"})
    return found


@pytest.mark.parametrize(
    ("losses", "min_delta", "waited", "best_iteration"),
    [
        ((3.0, 2.0, 1.0), 0.0, 0, 30),
        ((3.0, 3.0, 3.0), 0.0, 2, 10),
        ((3.0, 2.0, 2.5, 2.1, 1.9), 0.0, 0, 50),
        ((3.0, 2.0, 2.5, 2.1, 2.2), 0.0, 3, 20),
        ((3.0, 2.9, 2.8, 2.7), 0.25, 0, 40),  # little by little it has fallen far enough
        ((3.0, 2.9, 2.8), 0.25, 2, 10),
        ((3.0, 2.5), 0.5, 0, 20),  # by just so much
        ((None, 3.0, None, None), 0.0, 2, 20),
        ((None, None), 0.0, 2, 0),
    ],
)
def test_the_count_of_validations_without_a_better_loss(losses, min_delta, waited, best_iteration):
    found = plateau_of(lines(*losses), min_delta)
    assert (found.waited, found.best_iteration) == (waited, best_iteration)


def test_it_ends_at_the_validation_that_was_one_too_many():
    written = lines(3.0, 2.0, 2.0, 2.0, 2.0)
    assert [bool(has_stopped(written, at, 2, 0.0)) for at in (20, 30, 40, 50)] == [False, False, True, True]


def test_it_goes_on_where_nobody_asked_or_nothing_was_validated_here():
    written = lines(3.0, 2.0, 2.0, 2.0)
    assert has_stopped(written, 40, None, 0.0) is None
    assert has_stopped(written, 45, 2, 0.0) is None


def test_the_reason_has_the_numbers():
    found = has_stopped(lines(3.0, 2.25, 2.5, 2.5), 40, 2, 0.0)
    assert found.reason(0.0) == "early stop: 2 validations without a better loss (best: 2.2500 at step 20)"
    assert has_stopped(lines(None, None), 20, 2, 0.0).reason(0.1).endswith("(best: none is known)")


def test_the_reason_names_by_how_much_a_lower_loss_was_not_better():
    found = has_stopped(lines(2.8761, 2.7838, 2.7), 30, 2, 0.3)
    assert (
        found.reason(0.3) == "early stop: 2 validations, none better by at least 0.3 than 2.8761 at step 10"
    )
    assert has_stopped(lines(2.0, 2.0), 20, 1, 0.0).reason(0.0).startswith("early stop: 1 validation without")
