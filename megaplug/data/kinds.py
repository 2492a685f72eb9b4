"""The forms in which text and tokens lie on a disk, told by the ending of a file's name."""

from __future__ import annotations

TEXT, LINES, PARQUET, ARROW, PREFIX = "text", "lines", "parquet", "arrow", "prefix"
"""One document a file; one a line of JSON; one a row of a table (two forms); documents tokenized already."""

KINDS = {
    ".txt": TEXT,
    ".txt.gz": TEXT,
    ".txt.zst": TEXT,
    ".jsonl": LINES,
    ".jsonl.gz": LINES,
    ".jsonl.zst": LINES,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".idx": PREFIX,
    ".bin": PREFIX,
}

KNOWN = (
    "known are .txt and .jsonl (also .gz and .zst), .parquet, a Hugging Face data set on disk, a Megatron "
    "prefix (.bin and .idx), a folder of them, and stdlib"
)


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, or None if the ending is not a known one."""
    return KINDS.get(ending_of(name))


def ending_of(name: str) -> str:
    """The ending in small letters, two parts of it for compressed files: ``.jsonl.gz``.

    A ``.BIN`` or ``.IDX`` stays as it is: Megatron looks for small letters.
    """
    parts = name.lower().rsplit(".", 2)
    if len(parts) == 3 and parts[2] in ("gz", "zst"):
        return f".{parts[1]}.{parts[2]}"
    ending = f".{parts[-1]}" if len(parts) > 1 else ""
    return ending if KINDS.get(ending) != PREFIX else name[-len(ending) :]


def is_compressed(name: str) -> bool:
    """Whether a file must be read from its beginning."""
    return name.lower().endswith((".gz", ".zst"))
