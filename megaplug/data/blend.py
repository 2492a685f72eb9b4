"""From the entries of the cache to what a job reads: one data set a split, or several drawn by weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megaplug.data import cache
from megaplug.data.tokenizers import Tokenizer
from megaplug.job.facts import SPLITS, DataFacts, Part
from megaplug.job.sources import numbered


@dataclass(frozen=True)
class Entry:
    """An entry of the cache.

    Attributes:
        fingerprint: Of its content.
        folder: Where it is.
        values: Its ``entry.json``.
    """

    fingerprint: str
    folder: Path
    values: dict[str, Any]

    def prefix(self, split: str) -> str:
        """Where a split of it lies."""
        return str(self.values.get("prefixes", {}).get(split, self.folder / split))


@dataclass(frozen=True)
class Given:
    """What a source gives.

    Attributes:
        name: Of the source.
        title: For people.
        weight: Its share of the samples, in proportion to the others'; None for its share of the tokens.
        entries: More than one where a folder holds prefixes.
        becomes: Which split of the job each of theirs is, where it is another.
        num_bad: Lines and documents that were left out.
    """

    name: str
    title: str
    weight: Fraction | None
    entries: list[Entry]
    becomes: dict[str, str]
    num_bad: int


def facts(given: Sequence[Given], tokenizer: Tokenizer, root: Path) -> DataFacts:
    """The facts of a job.

    Args:
        given: Its sources, in the order of the configuration.
        tokenizer: Of all of them.
        root: The cache.
    """
    parts: dict[str, list[tuple[str, str, Part]]] = {split: _parts(given, split) for split in SPLITS}
    single = len(given) == 1 and len(given[0].entries) == 1
    one = given[0].entries[0]
    fingerprint = one.fingerprint if single else _fingerprint(parts)
    several = {split: [part for *_, part in found] for split, found in parts.items() if len(found) > 1}
    return DataFacts(
        fingerprint=fingerprint,
        prefixes={split: found[0][2].prefix for split, found in parts.items() if len(found) == 1},
        num_tokens={split: sum(part.num_tokens for *_, part in found) for split, found in parts.items()},
        num_documents={
            split: sum(part.num_documents for *_, part in found) for split, found in parts.items()
        },
        vocab_size=tokenizer.vocab_size,
        unigram_loss=one.values["unigram_loss"]
        if single
        else _unigram_loss(root, fingerprint, tokenizer.vocab_size, parts),
        source=_title(given, several),
        eod=tokenizer.eod,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_arguments=tokenizer.megatron_arguments(root),
        blends=several,
        num_bad=sum(source.num_bad for source in given),
    )


def _parts(given: Sequence[Given], split: str) -> list[tuple[str, str, Part]]:
    """All that a split of the job consists of: fingerprint of the entry and weight, its split, the part."""
    found: list[tuple[Fraction, str, str, Entry, str]] = []
    taken = {source.name for source in given}
    for source in given:
        theirs = [name for name in SPLITS if source.becomes.get(name, name) == split]
        if source.becomes:
            theirs = [name for name in theirs if name in source.becomes]
        chosen = [(e, name) for e in source.entries for name in theirs if e.values["num_tokens"].get(name)]
        whole = sum(entry.values["num_tokens"][name] for entry, name in chosen)
        for entry, name in chosen:
            tokens = entry.values["num_tokens"][name]
            weight = Fraction(tokens) if source.weight is None else source.weight * tokens / whole
            label = source.name if len(chosen) == 1 else numbered(source.name, taken, 1)
            found.append((weight, entry.fingerprint, name, entry, label))
    total = sum((weight for weight, *_ in found), start=Fraction(0))
    return [
        (
            f"{fingerprint} {weight / total}",
            name,
            Part(
                name=label,
                weight=float(weight / total),
                prefix=entry.prefix(name),
                num_tokens=entry.values["num_tokens"][name],
                num_documents=entry.values["num_documents"][name],
            ),
        )
        for weight, fingerprint, name, entry, label in found
    ]


def _fingerprint(parts: dict[str, list[tuple[str, str, Part]]]) -> str:
    """Of which entries in which order with which weights; what the sources are called does not count."""
    values = {split: [[weighted, name] for weighted, name, _ in found] for split, found in parts.items()}
    return hashlib.sha256(json.dumps(["blend", cache.FORMAT, values]).encode()).hexdigest()[:32]


def _unigram_loss(
    root: Path, fingerprint: str, vocab_size: int, parts: dict[str, list[tuple[str, str, Part]]]
) -> float | None:
    """As `megaplug.data.unigram`, of the mixture; kept in the cache."""
    if not (parts["train"] and parts["valid"]):
        return None
    file = root / "blends" / f"{fingerprint}.json"
    known = _known_loss(file)
    if known is not None:
        return known
    from megaplug.data.unigram import mixture, unigram_loss

    train, valid = (mixture([part for *_, part in parts[split]], vocab_size) for split in ("train", "valid"))
    loss = unigram_loss(train, valid)
    cache.write_cached(file, json.dumps({"unigram_loss": loss}) + "\n")
    return loss


def _known_loss(file: Path) -> float | None:
    """What an earlier start has counted; None where there is none, or a damaged one, to be written anew."""
    try:
        return float(json.loads(file.read_bytes())["unigram_loss"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _title(given: Sequence[Given], several: dict[str, list[Part]]) -> str:
    if len(given) == 1:
        return given[0].title
    train = several.get("train")
    own = [source for source in given if not source.becomes]
    if train is None:
        return own[0].title
    return ", ".join(f"{part.name} {part.weight:.1%}" for part in train)
