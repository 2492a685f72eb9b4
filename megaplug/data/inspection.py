"""What a prepared set holds: documents and their lengths, use of the vocabulary, and a piece of its text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megaplug.data.indexed import IndexedTokens
from megaplug.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from megaplug.data.tokenizers import Tokenizer

_IDS_AT_ONCE = 4_000_000
_LARGEST_ID = 2**26  # far beyond any vocabulary; numbers above it are no ids, and would take memory to count
_SAMPLED_DOCUMENTS = 64
_SAMPLED_IDS = 2_000  # of each
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Inspection:
    """One ``.bin``/``.idx`` pair.

    Attributes:
        prefix: Its path without the endings.
        num_tokens: Ids, those that end documents included.
        num_documents: Documents.
        id_type: numpy's name for the type of an id.
        num_bytes: Of the ids on the disk.
        lengths: ``shortest``, ``p10``, ``median``, ``mean``, ``p90``, ``p99`` and ``longest`` in tokens.
        histogram: Rows of smallest length, largest length, number of documents; each is twice as wide.
        largest_id: The largest id that occurs.
        num_used_ids: How many different ids occur.
        vocab_size: Of the tokenizer; None if none was given, or if it lacks ids that occur.
        num_ends: How often the tokenizer's end of a document occurs; None as above.
        bytes_per_token: UTF-8 bytes of text an id, in documents drawn evenly from the set; None as above.
        sample: The beginning of the first document, as text; None as above.
    """

    prefix: str
    num_tokens: int
    num_documents: int
    id_type: str
    num_bytes: int
    lengths: dict[str, float]
    histogram: list[tuple[int, int, int]]
    largest_id: int
    num_used_ids: int
    vocab_size: int | None
    num_ends: int | None
    bytes_per_token: float | None
    sample: str | None

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def inspect(pair: IndexedTokens, tokenizer: Tokenizer | None, *, sample_characters: int = 300) -> Inspection:
    """Looks at all ids of a pair once.

    Args:
        pair: The pair.
        tokenizer: With which it was made, if that is known.
        sample_characters: How much text of it is shown.

    Raises:
        UserError: It holds numbers that can be no ids.
    """
    counts = _counts(pair)
    largest = int(counts.size) - 1
    known = tokenizer if tokenizer is not None and largest < tokenizer.vocab_size else None
    return Inspection(
        prefix=str(pair.prefix),
        num_tokens=pair.num_tokens,
        num_documents=pair.num_documents,
        id_type=pair.tokens.dtype.name,
        num_bytes=int(pair.tokens.nbytes),
        lengths=length_figures(pair.lengths),
        histogram=length_histogram(pair.lengths),
        largest_id=largest,
        num_used_ids=int((counts > 0).sum()),
        vocab_size=None if known is None else known.vocab_size,
        num_ends=None if known is None else int(counts[known.eod]) if known.eod <= largest else 0,
        bytes_per_token=None if known is None else _bytes_per_token(pair, known),
        sample=None if known is None else _sample(pair, known, sample_characters),
    )


def length_figures(lengths: np.ndarray) -> dict[str, float]:
    """Lengths of documents in a few figures; none where there are no documents."""
    import numpy as np

    if not lengths.size:
        return {}
    quantiles = {name: float(np.quantile(lengths, share)) for name, share in _QUANTILES.items()}
    return {
        "shortest": float(lengths.min()),
        **quantiles,
        "mean": float(lengths.mean()),
        "longest": float(lengths.max()),
    }


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Smallest length, largest length and number of documents: 0, 1, 2 to 3, 4 to 7 and so on."""
    import numpy as np

    if not lengths.size:
        return []
    # frexp gives the number of binary digits of a whole number.
    digits = np.frexp(lengths.astype(np.float64))[1]
    numbers = np.bincount(digits)
    first = int(digits.min())
    return [
        (2**digit // 2, max(2**digit - 1, 0), int(number))
        for digit, number in enumerate(numbers.tolist())
        if digit >= first
    ]


def _counts(pair: IndexedTokens) -> np.ndarray:
    """How often each id up to the largest one occurs: int64 ``[largest + 1]``."""
    import numpy as np

    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, pair.num_tokens, _IDS_AT_ONCE):
        ids = pair.tokens[start : start + _IDS_AT_ONCE]
        if ids.min() < 0 or ids.max() > _LARGEST_ID:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(
                f"{pair.prefix}.bin holds {wrong:,}, which is no id of text",
                hint="it may be damaged: write it again",
            )
        some = np.bincount(ids, minlength=counts.size)
        some[: counts.size] += counts
        counts = some
    return counts


def _bytes_per_token(pair: IndexedTokens, tokenizer: Tokenizer) -> float | None:
    import numpy as np

    chosen = np.linspace(0, pair.num_documents - 1, min(_SAMPLED_DOCUMENTS, pair.num_documents)).astype(int)
    num_bytes = num_tokens = 0
    for number in chosen.tolist():
        ids = pair.document(number)[:_SAMPLED_IDS].tolist()
        num_bytes += len(tokenizer.decode(ids).encode())
        num_tokens += len(ids)
    return num_bytes / num_tokens if num_tokens else None


def _sample(pair: IndexedTokens, tokenizer: Tokenizer, characters: int) -> str:
    if not pair.num_documents:
        return ""
    text = tokenizer.decode(pair.document(0)[: 4 * characters].tolist())
    return text if len(text) <= characters else text[:characters] + "..."
