"""The loss that a model must beat: that of one which knows only how often each token occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaplug.data.indexed import read_indexed
from megaplug.job.facts import Part

if TYPE_CHECKING:
    import numpy as np

_IDS_AT_ONCE = 4_000_000


def count_ids(ids: np.ndarray, vocab_size: int, tell: Callable[[int], None] = lambda _: None) -> np.ndarray:
    """How often each id occurs: int64 ``[vocab_size]``.

    Args:
        ids: ``[num_ids]``, may be a memory map.
        vocab_size: Above every id.
        tell: Is told numbers of bytes done.
    """
    import numpy as np

    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, ids.size, _IDS_AT_ONCE):
        some = np.asarray(ids[start : start + _IDS_AT_ONCE])
        counts += np.bincount(some, minlength=vocab_size)
        tell(some.nbytes)
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


def mixture(parts: Sequence[Part], vocab_size: int) -> np.ndarray:
    """How often each id would occur in parts that are drawn by weight: float64 ``[vocab_size]``."""
    import numpy as np

    mixed = np.zeros(vocab_size, dtype=np.float64)
    for part in parts:
        mixed += part.weight * count_ids(read_indexed(Path(part.prefix)).tokens, vocab_size) / part.num_tokens
    return mixed * sum(part.num_tokens for part in parts)
