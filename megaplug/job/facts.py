"""What is known about the data once it has been tokenized: all that the other rooms may ask about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SPLITS = ("train", "valid", "test")
"""The three splits, in the order of ``data.split`` and of Megatron's own."""


@dataclass(frozen=True)
class DataFacts:
    """The tokenized corpus of a job.

    Attributes:
        fingerprint: Hex digest of content, tokenizer and split; the same wherever the files lie.
        prefixes: Split name to the absolute path of its ``.bin``/``.idx`` without the ending; only
            splits that hold tokens.
        num_tokens: Split name to its number of tokens, end-of-document tokens included; all splits.
        num_documents: Split name to its number of documents; a document that is cut in two by a
            border counts in both splits.
        vocab_size: Number of token ids, before Megatron's padding.
        unigram_loss: Cross entropy in nats a token on ``valid`` of a unigram model fitted on ``train``
            (add-one smoothing); None when one of the two is empty.
        source: A name for people, such as "Python 3.12.1 standard library (686 files)".
        eod: Id of the end-of-document token.
        tokenizer_fingerprint: Hex digest of what decides how text becomes ids.
        tokenizer_arguments: Megatron's command-line arguments that build the same tokenizer.
    """

    fingerprint: str
    prefixes: dict[str, str]
    num_tokens: dict[str, int]
    num_documents: dict[str, int]
    vocab_size: int
    unigram_loss: float | None
    source: str
    eod: int
    tokenizer_fingerprint: str
    tokenizer_arguments: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain values that JSON and YAML can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataFacts:
        """The facts that ``to_dict`` gave.

        Raises:
            KeyError: A field is missing, or there is one that is not known.
        """
        names = {f.name for f in fields(cls)}
        if names != set(values):
            raise KeyError(f"data facts differ in {sorted(names ^ set(values))}")
        return cls(**{name: _plain(values[name]) for name in names})


def _plain(value: Any) -> Any:
    """A copy of mappings and lists, so that no configuration object is shared."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else value
