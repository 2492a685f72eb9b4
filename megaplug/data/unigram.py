"""The loss that a model must beat: that of one which knows only how often each token occurs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_TOKENS_AT_ONCE = 4_000_000


def count_tokens(bin_file: Path, dtype: type[np.integer], vocab_size: int) -> np.ndarray:
    """How often each id occurs in a ``.bin`` file: int64 ``[vocab_size]``."""
    import numpy as np

    counts = np.zeros(vocab_size, dtype=np.int64)
    with bin_file.open("rb") as stream:
        while (tokens := np.fromfile(stream, dtype=dtype, count=_TOKENS_AT_ONCE)).size:
            counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def unigram_loss(train: np.ndarray, valid: np.ndarray) -> float:
    """Cross entropy of a unigram model, in nats a token.

    ``-sum_i valid_i / N_valid * log((train_i + 1) / (N_train + V))``: add-one (Laplace) smoothing over
    all V ids, so that an id that training never saw costs a finite loss.

    Args:
        train: Counts ``[V]`` on which it is fitted.
        valid: Counts ``[V]`` on which it is measured, not all zero.
    """
    import numpy as np

    log_probability = np.log(train + 1.0) - np.log(train.sum() + float(train.size))
    return float(-(valid * log_probability).sum() / valid.sum())
