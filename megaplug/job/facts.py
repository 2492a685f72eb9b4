"""What is known about the data once it has been tokenized: all that the other rooms may ask about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SPLITS = ("train", "valid", "test")
"""The three splits, in the order of ``data.split`` and of Megatron's own."""


@dataclass(frozen=True)
class Part:
    """What one source gives to a split.

    Attributes:
        name: Of the source.
        weight: Its share of the samples; those of a split add up to 1.
        prefix: Absolute path of its ``.bin``/``.idx`` without the ending.
        num_tokens: End-of-document tokens included.
        num_documents: Sequences of the ``.idx``.
    """

    name: str
    weight: float
    prefix: str
    num_tokens: int
    num_documents: int


@dataclass(frozen=True)
class DataFacts:
    """The tokenized corpus of a job.

    Attributes:
        fingerprint: Hex digest of content, tokenizer and split; the same wherever the files lie.
        prefixes: Split name to the absolute path of its ``.bin``/``.idx`` without the ending; only
            splits that hold tokens of one source.
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
        blends: Split name to its parts, for splits that are drawn from several by weight.
        num_bad: Lines and documents that could not be used and were left out.
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
    blends: dict[str, list[Part]] = field(default_factory=dict)
    num_bad: int = 0

    def __post_init__(self) -> None:
        """Parts may be given as the plain values that ``to_dict`` makes of them."""
        blends = {
            split: [part if isinstance(part, Part) else Part(**part) for part in parts]
            for split, parts in self.blends.items()
        }
        object.__setattr__(self, "blends", blends)

    def parts(self, split: str) -> list[Part]:
        """What a split consists of: none, one or several parts."""
        if split in self.blends:
            return self.blends[split]
        if split not in self.prefixes:
            return []
        counts = self.num_tokens[split], self.num_documents[split]
        return [Part(self.source, 1.0, self.prefixes[split], *counts)]

    def data_path(self, split: str) -> list[str]:
        """The words of Megatron's ``--<split>-data-path``: weights and prefixes in turns, or one prefix."""
        parts = self.parts(split)
        if len(parts) == 1:
            return [parts[0].prefix]
        return [word for part in parts for word in (repr(part.weight), part.prefix)]

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
