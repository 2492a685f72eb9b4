"""What ``launch/prepare.py`` answers, for a person; the same as plain values is its JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaplug.commands.cli import CommandLine
from megaplug.job.facts import SPLITS, DataFacts

if TYPE_CHECKING:
    from megaplug.data.inspection import Inspection
    from megaplug.data.tokenizers import Tokenizer

_BAR = 40


def prepared_json(facts: DataFacts, places: dict[str, str], seconds: float) -> dict[str, Any]:
    """The facts of prepared data, with the sizes of its files.

    Args:
        facts: Of the data.
        places: Prefix in the cache to prefix elsewhere, for pairs that were copied.
        seconds: That it took.
    """
    sets = []
    words: list[str] = []
    for split in SPLITS:
        parts = facts.parts(split)
        for part in parts:
            prefix = places.get(part.prefix, part.prefix)
            size = sum(Path(f"{prefix}.{ending}").stat().st_size for ending in ("bin", "idx"))
            sets.append(
                {
                    "split": split,
                    "source": part.name,
                    "weight": part.weight,
                    "prefix": prefix,
                    "num_tokens": part.num_tokens,
                    "num_documents": part.num_documents,
                    "num_bytes": size,
                }
            )
        if parts:
            words += [f"--{split}-data-path", *(places.get(word, word) for word in facts.data_path(split))]
    return {
        "source": facts.source,
        "fingerprint": facts.fingerprint,
        "vocab_size": facts.vocab_size,
        "eod": facts.eod,
        "sets": sets,
        "num_bad": facts.num_bad,
        "unigram_loss": facts.unigram_loss,
        "seconds": seconds,
        "megatron_args": [*words, *facts.tokenizer_arguments],
    }


def prepared_text(report: dict[str, Any], facts: DataFacts, command: CommandLine) -> str:
    """What a person wants to know of it."""
    rows = [("split", "tokens", "documents", "MB", "where")]
    for one in report["sets"]:
        several = len(facts.parts(one["split"])) > 1
        label = f"{one['split']} {one['source']} {one['weight']:.1%}" if several else one["split"]
        rows.append(
            (
                label,
                f"{one['num_tokens']:,}",
                f"{one['num_documents']:,}",
                f"{one['num_bytes'] / 1e6:,.1f}",
                one["prefix"],
            )
        )
    lines = [report["source"], *_table(rows), ""]
    lines.append(f"vocabulary  {report['vocab_size']:,} ids, {report['eod']:,} ends a document")
    if report["unigram_loss"] is not None:
        lines.append(f"to beat     {report['unigram_loss']:.4f} nats per token, the loss of a unigram model")
    if report["num_bad"]:
        lines.append(f"left out    {report['num_bad']:,} lines or documents that cannot be used")
    lines.append(f"took        {report['seconds']:.1f} s")
    lines.append(f"Megatron    {shlex.join(report['megatron_args'])}")
    return "\n".join(lines)


def inspected_text(
    report: dict[str, Any], found: Sequence[tuple[str, Inspection]], tokenizer: Tokenizer | None
) -> str:
    """What a person wants to know of prepared sets."""
    names = ("shortest", "p10", "median", "mean", "p90", "p99", "longest")
    rows: list[tuple[str, ...]] = [("set", "tokens", "documents", "ids", "MB", *names)]
    for label, one in found:
        figures = [f"{one.lengths[name]:,.0f}" if one.lengths else "-" for name in names]
        counts = f"{one.num_tokens:,}", f"{one.num_documents:,}", one.id_type, f"{one.num_bytes / 1e6:,.1f}"
        rows.append((label, *counts, *figures))
    lines = [report["source"], *_table(rows, left=1)]
    for label, one in found:
        lines += ["", f"{label}: {Path(one.prefix)}", *_use(one, tokenizer)]
        most = max((number for *_, number in one.histogram), default=0)
        for low, high, number in one.histogram:
            bar = "#" * round(_BAR * number / most)
            span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            lines.append(f"  {span:>24} tokens  {number:>10,}  {bar}".rstrip())
        if one.sample is not None:
            lines += ["  it begins:", *(f"    | {_harmless(line)}" for line in one.sample.splitlines())]
    if report["picture"]:
        lines += ["", f"picture  {report['picture']}"]
    return "\n".join(lines)


def trained_text(report: dict[str, Any], command: CommandLine) -> str:
    """What a person wants to know of a tokenizer that was trained."""
    size, wanted = report["vocab_size"], report["asked_vocab_size"]
    lines = [
        f"trained on  {report['num_documents']:,} documents, {report['num_bytes'] / 1e6:,.1f} MB of text",
        f"vocabulary  {size:,} tokens; {report['eod']} ends a document",
        f"one token   {report['bytes_per_token']:.2f} bytes of that text",
        f"took        {report['seconds']:.1f} s",
        f"folder      {report['folder']}",
    ]
    if size < wanted:
        lines.insert(
            2, f"            {wanted:,} were asked for, but no pair of the text is left that occurs twice"
        )
    if report["num_bad"]:
        lines.append(f"left out    {report['num_bad']:,} lines or documents that cannot be used")
    use = ["tokenizer=huggingface", f"tokenizer.path={report['folder']}"]
    own = ("action", "output", "overwrite", "out", "vocab_size")
    typed = command.typed(*use, *(f"-{key}" for key in own))
    return "\n".join([*lines, f"next        {typed}"])


def _use(one: Inspection, tokenizer: Tokenizer | None) -> list[str]:
    used = f"  {one.num_used_ids:,} different ids occur, the largest is {one.largest_id:,}"
    if tokenizer is None:
        return [used, "  tokenizer=... tokenizer.path=... shows its text"]
    if one.vocab_size is None:
        return [used, f"  the tokenizer has only {tokenizer.vocab_size:,} ids: it was made with another one"]
    share = one.num_used_ids / one.vocab_size
    lines = [f"{used}; the vocabulary has {one.vocab_size:,} ({share:.1%} are used)"]
    if one.num_ends != one.num_documents:
        lines.append(
            f"  {one.num_ends:,} ends of a document ({tokenizer.eod}) in {one.num_documents:,} documents"
        )
    if one.bytes_per_token is not None:
        lines.append(f"  {one.bytes_per_token:.2f} bytes of text a token, in a sample of its documents")
    return lines


def _harmless(line: str) -> str:
    """Text of anybody's, without what would move a terminal's cursor or change its colours."""
    return "".join(character if character.isprintable() else "\ufffd" for character in line.expandtabs(4))


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns of one width; the first ``left`` and the last of a path stand at their left edge."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left or rows[0][column] == "where" else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
