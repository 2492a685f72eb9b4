"""The algebra of ``data.split``: where the tokens of a shuffled corpus are cut into train, valid and test."""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction

from megaplug.errors import UserError
from megaplug.job.facts import SPLITS

Shares = tuple[Fraction, Fraction, Fraction]


def parse_split(text: str) -> Shares:
    """The shares of train, valid and test, exact and with the sum 1.

    Args:
        text: Up to three numbers separated by commas, such as ``95,5,0``; those left out are 0.

    Raises:
        UserError: It is not that, or nothing is left to train on.
    """
    hint = "such as data.split='95,5,0': the shares of train, valid and test"
    parts = [part.strip() for part in str(text).split(",")]
    try:
        numbers = [Fraction(part) for part in parts]
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"data.split: {text!r} is not a list of numbers", hint=hint) from error
    if len(numbers) > len(SPLITS):
        raise UserError(f"data.split: {text!r} has {len(numbers)} numbers, not three", hint=hint)
    if min(numbers) < 0:
        raise UserError(f"data.split: {text!r} has a negative share", hint=hint)
    if numbers[0] == 0:
        raise UserError(f"data.split: {text!r} leaves nothing to train on", hint=hint)
    whole = sum(numbers, start=Fraction(0))
    train, valid, test = (number / whole for number in [*numbers, Fraction(0), Fraction(0)][:3])
    return train, valid, test


def borders(num_tokens: int, shares: Shares) -> tuple[int, int, int]:
    """The number of tokens before the end of each split, rounded down; the last is ``num_tokens``.

    Raises:
        UserError: A split with a share would get no token.
    """
    train = int(num_tokens * shares[0])
    ends = (train, int(num_tokens * (shares[0] + shares[1])), num_tokens)
    for name, share, begin, end in zip(SPLITS, shares, (0, *ends[:2]), ends, strict=True):
        if share > 0 and begin == end:
            raise UserError(
                f"data.split: {name} is to have {float(share):.4%} of {num_tokens} tokens, which is none",
                hint="give it a larger share, or 0, or more text",
            )
    return ends


def without(shares: Shares, splits: Collection[str]) -> Shares:
    """The shares when some splits have sources of their own: theirs go to the others, in proportion."""
    left = [Fraction(0) if name in splits else share for name, share in zip(SPLITS, shares, strict=True)]
    whole = sum(left, start=Fraction(0))
    train, valid, test = (share / whole for share in left)
    return train, valid, test
