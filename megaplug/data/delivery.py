"""Puts prepared data where a person wants it: named ``.bin``/``.idx`` pairs outside the cache."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megaplug.data.cache import cache_root
from megaplug.data.indexed import IndexedTokens, read_indexed, write_index
from megaplug.data.saved_sets import is_set
from megaplug.data.sources import STDLIB
from megaplug.errors import UserError
from megaplug.job.facts import SPLITS, DataFacts, Part
from megaplug.job.schema import DataConfig
from megaplug.job.sources import KEYS, numbered, sources
from megaplug.runs.atomic import beside, fsync_folder

_IDS_AT_ONCE = 4_000_000
_HINT = "choose another place with out="


def targets(facts: DataFacts, out: Path) -> list[tuple[str, Part, Path]]:
    """Split, part and new prefix of what a job reads: ``<out>-train``, or one for each source of a blend.

    No two have one prefix.
    """
    found, taken = [], set[str]()
    for split in SPLITS:
        parts = facts.parts(split)
        for part in parts:
            name = f"{out.name}-{split}" if len(parts) == 1 else f"{out.name}-{split}-{part.name}"
            name = numbered(name, taken, 2) if name in taken else name
            taken.add(name)
            found.append((split, part, out.with_name(name)))
    return found


def deliver(facts: DataFacts, out: Path, *, overwrite: bool) -> dict[str, str]:
    """Copies all pairs of a job.

    A pair is complete as soon as its ``.idx`` is there, which is written last.

    Args:
        facts: The prepared data.
        out: What the new prefixes begin with.
        overwrite: Whether pairs that are there may be replaced.

    Returns:
        Old prefix to new prefix.

    Raises:
        UserError: A pair is there already, or the disk refused.
    """
    chosen = targets(facts, out)
    there = [file for *_, prefix in chosen for file in _files(prefix) if file.exists()]
    if there and not overwrite:
        refuse_existing(there)
    pairs = [(read_indexed(Path(part.prefix)), prefix) for _, part, prefix in chosen]
    with delivery_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(pair.tokens.nbytes + 20 * pair.num_documents for pair, _ in pairs)
    if (free := shutil.disk_usage(out.parent).free) < needed:
        raise UserError(
            f"out: {needed / 1e6:,.1f} MB are needed on the disk of {out.parent}, "
            f"and {free / 1e6:,.1f} MB are left",
            hint=f"free some space, or {_HINT}",
        )
    with delivery_errors(out):
        for pair, prefix in pairs:
            _copy(pair, prefix)
    return {part.prefix: str(prefix) for _, part, prefix in chosen}


def refuse_among_sources(out: Path, data: DataConfig) -> None:
    """Refuses a place in a folder that is a source: the next start would read what was put there.

    Args:
        out: What the new prefixes begin with.
        data: Names the sources, and the cache, which is no part of them.
    """
    place = out.resolve()
    cache = cache_root(data.cache_dir).resolve()
    for key in KEYS:
        for spec in sources(data, key):
            root = Path(spec.path).expanduser().resolve()
            if spec.path in ("", STDLIB) or not root.is_dir() or not place.is_relative_to(root):
                continue
            folders = [folder for folder in place.parents if folder.is_relative_to(root)]
            is_hidden = any(part.startswith(".") for part in place.relative_to(root).parts)
            if not (is_hidden or cache in folders or any(map(is_set, folders))):
                raise UserError(
                    f"out: {out} lies in {spec.path}, a source: the next start would read it as data.{key}",
                    hint=_HINT,
                )


def refuse_existing(there: list[Path]) -> None:
    """Says what would be overwritten."""
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    raise UserError(f"out: {there[0]}{more} is there already", hint="overwrite=true replaces it, or " + _HINT)


@contextlib.contextmanager
def delivery_errors(out: Path) -> Iterator[None]:
    """Turns what the disk refuses inside the block into a `UserError` that names ``out``."""
    try:
        yield
    except OSError as error:
        hint = f"free some space, or {_HINT}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else _HINT
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"out: {out} cannot be written: {reason}", hint=hint) from error


def _files(prefix: Path) -> list[Path]:
    return [prefix.with_name(f"{prefix.name}.{ending}") for ending in ("bin", "idx")]


def _copy(pair: IndexedTokens, prefix: Path) -> None:
    bin_file, idx_file = _files(prefix)
    unfinished = [beside(file) for file in (bin_file, idx_file)]
    try:
        with unfinished[0].open("wb") as stream:
            for start in range(0, pair.num_tokens, _IDS_AT_ONCE):
                stream.write(memoryview(pair.tokens[start : start + _IDS_AT_ONCE]).cast("B"))
            stream.flush()
            os.fsync(stream.fileno())
        write_index(unfinished[1], pair.tokens.dtype.name, pair.lengths)
        with unfinished[1].open("rb") as stream:
            os.fsync(stream.fileno())
        idx_file.unlink(missing_ok=True)  # an old index must not stand beside new ids
        unfinished[0].replace(bin_file)
        unfinished[1].replace(idx_file)
        fsync_folder(prefix.parent)
    finally:
        for file in unfinished:
            file.unlink(missing_ok=True)
