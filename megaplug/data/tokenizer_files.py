"""Files of tokenizers: of which kind one is, and where it is kept so that ranks read what was read here."""

from __future__ import annotations

import re
from pathlib import Path

from megaplug.data.cache import cache_errors
from megaplug.errors import UserError
from megaplug.runs.atomic import write_bytes_atomic

HUGGINGFACE, SENTENCEPIECE, TIKTOKEN = "huggingface", "sentencepiece", "tiktoken"

_NAMES = {
    HUGGINGFACE: "a tokenizer.json of Hugging Face",
    SENTENCEPIECE: "a SentencePiece model",
    TIKTOKEN: "a rank file of tiktoken",
}
# Where a folder is named, these are the files of each kind, the first that is there.
_IN_FOLDERS = {
    HUGGINGFACE: ("tokenizer.json",),
    SENTENCEPIECE: ("tokenizer.model", "*.model"),
    TIKTOKEN: ("*.tiktoken", "tokenizer.model", "*.model"),
}
# How the files of older tokenizers of Hugging Face begin, from which a tokenizer.json can be made.
_OTHER_FORMS = ("tokenizer", "vocab.", "merges.", "spiece.", "sentencepiece.")
_ENOUGH = 4096
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def kind_of(start: bytes) -> str | None:
    """The kind of a tokenizer's file by its first few thousand bytes; None if it is none of the three."""
    if _RANK_LINE.match(start):
        return TIKTOKEN
    # A model is a protobuf that begins with its first piece: field 1, a length, and again field 1, its text.
    if start[:1] == b"\n" and start[2:3] == b"\n":
        return SENTENCEPIECE
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return TIKTOKEN if b'"token_bytes"' in text else None
    return HUGGINGFACE if text.startswith(b"{") else None


def find_file(path: Path, kind: str) -> Path:
    """The one file of a kind that a path names, as a file or as the folder that holds it.

    Raises:
        UserError: There is none, there are several, or it is a file of another kind.
    """
    file = _in_folder(path, kind) if path.is_dir() else path
    found = kind_of(_start(file, kind))
    if found not in (kind, None):
        raise UserError(
            f"tokenizer.path: {file} is {_NAMES[found]}, not {_NAMES[kind]}", hint=f"use tokenizer={found}"
        )
    return file


def read_file(file: Path) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer.path: {file} cannot be read: {error.strerror}") from error


def suggested(path: Path) -> str:
    """The option that fits a file or folder, for a hint; all of them where that cannot be told."""
    files = (
        [path] if path.is_file() else [*path.glob("*.json"), *path.glob("*.model"), *path.glob("*.tiktoken")]
    )
    found = {kind_of(_start(file, "")) for file in files} - {None}
    usual = [kind for kind in _NAMES if kind in found][:1] or list(_NAMES)
    return " or ".join(f"tokenizer={kind}" for kind in usual)


def lay_out(cache: Path, name: str, contents: dict[str, bytes]) -> Path:
    """Writes files into ``<cache>/tokenizers/<name>/`` unless they are there; gives the folder.

    Args:
        cache: The data cache.
        name: Must differ whenever the contents do.
        contents: File name to content.

    Raises:
        UserError: The cache cannot be written.
    """
    folder = cache / "tokenizers" / name
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        if not (folder / file).is_file():
            try:
                write_bytes_atomic(folder / file, content)
            except UserError as error:
                raise UserError(error.message, hint="choose another place with data.cache_dir=") from error
    return folder


def _in_folder(folder: Path, kind: str) -> Path:
    patterns = _IN_FOLDERS[kind]
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise UserError(
                f"tokenizer.path: {folder} holds several files that may be it: {names}", hint="name the one"
            )
    others = [other for other in _NAMES if other != kind and _holds(folder, other)]
    hint = f"name {_NAMES[kind]}, or the folder that holds it"
    if others:
        hint = f"it holds {_NAMES[others[0]]}: use tokenizer={others[0]}"
    elif kind == HUGGINGFACE and any(file.name.startswith(_OTHER_FORMS) for file in folder.iterdir()):
        hint = (
            "this folder holds a tokenizer of another form; convert it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    raise UserError(f"tokenizer.path: no {' or '.join(patterns)} is in {folder}", hint=hint)


def _holds(folder: Path, kind: str) -> bool:
    return any(
        kind_of(_start(file, kind)) == kind for pattern in _IN_FOLDERS[kind] for file in folder.glob(pattern)
    )


def _start(file: Path, kind: str) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_ENOUGH)
    except FileNotFoundError as error:
        wanted = _NAMES.get(kind, "a tokenizer's file")
        raise UserError(
            f"tokenizer.path: {file} does not exist", hint=f"name {wanted}, or the folder that holds it"
        ) from error
    except OSError as error:
        raise UserError(f"tokenizer.path: {file} cannot be read: {error.strerror}") from error
