"""How text becomes ids here, and which of Megatron's arguments build a tokenizer that agrees with it.

The text is tokenized before Megatron starts, so Megatron's own tokenizer is asked for ``vocab_size`` and
``eod`` only; where it cannot read what is read here, its ``NullTokenizer`` says these two. Its
``ByteLevelTokenizer`` is not among those that its arguments can build, and ends a document with id 0, which
is a byte of text; its ``NullTokenizer`` of 257 ids has ``eod`` 256, beyond every byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

if TYPE_CHECKING:
    import numpy as np

NUM_BYTES = 256


class Tokenizer(Protocol):
    """What the data room asks of a tokenizer.

    Attributes:
        vocab_size: Every id is below it.
        eod: Id that ends a document.
        fingerprint: Hex digest of all that decides how text becomes ids.
    """

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def eod(self) -> int: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end of the document."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; an id that stands for no text is left out."""

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of UTF-8 documents, one array ``[num_tokens]`` each, each ended by ``eod``."""

    def megatron_arguments(self, cache: Path) -> list[str]:
        """Megatron's arguments that build the same tokenizer; what they name is written below ``cache``."""


class ByteTokenizer:
    """The bytes of UTF-8 as ids 0 to 255, and 256 for the end of a document."""

    vocab_size = NUM_BYTES + 1
    eod = NUM_BYTES
    fingerprint = hashlib.sha256(b"bytes 0-255, end of document 256").hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`; bytes that are not UTF-8 are shown as replacement characters."""
        return bytes(i for i in ids if i < NUM_BYTES).decode(errors="replace")

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`; dtype uint16."""
        import numpy as np

        encoded = []
        for text in documents:
            ids = np.empty(len(text) + 1, dtype=np.uint16)
            ids[:-1] = np.frombuffer(text, dtype=np.uint8)
            ids[-1] = self.eod
            encoded.append(ids)
        return encoded

    def megatron_arguments(self, cache: Path) -> list[str]:
        """See `Tokenizer`."""
        return null_tokenizer(self.vocab_size, self.eod)


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the configuration names. Nothing is downloaded and no code of others is run.

    Raises:
        UserError: There is no such type, its package is missing, or its file cannot be used.
    """
    path = None if config.path is None else Path(config.path).expanduser().absolute()
    if config.type == "byte":
        if path is not None:
            from megaplug.data.tokenizer_files import suggested

            raise UserError(
                f"tokenizer.path: {config.path} is given, but a byte tokenizer has no file",
                hint=f"add {suggested(path)}, or leave tokenizer.path away",
            )
        return ByteTokenizer()
    if config.type not in _WHAT:
        known = " or ".join(f"tokenizer={name}" for name in ("byte", *_WHAT))
        raise UserError(f"tokenizer.type: {config.type!r} is not known", hint=f"choose {known}")
    if path is None:
        raise UserError(
            f"tokenizer.path: it is not given, and tokenizer={config.type} is read from a file",
            hint=f"tokenizer.path=<{_WHAT[config.type]}, or the folder that holds it>",
        )
    if config.type == "sentencepiece":
        from megaplug.data.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(path, config.eod)
    if config.type == "tiktoken":
        from megaplug.data.tiktoken_ranks import TiktokenTokenizer

        return TiktokenTokenizer(path, config)
    from megaplug.data.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path, config.eod)


_WHAT = {
    "huggingface": "a tokenizer.json",
    "sentencepiece": "a .model of SentencePiece",
    "tiktoken": "a rank file of tiktoken",
}


def null_tokenizer(vocab_size: int, eod: int) -> list[str]:
    """Megatron's arguments for a tokenizer that knows only the number of ids and which ends a document."""
    return [
        *("--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", str(vocab_size)),
        *("--null-tokenizer-eod-id", str(eod)),
    ]


def tokenizer_fingerprint(config: TokenizerConfig) -> str:
    """Hex digest of all that decides how text becomes ids; raises what `load_tokenizer` raises."""
    return load_tokenizer(config).fingerprint


def megatron_tokenizer_arguments(config: TokenizerConfig, cache: Path | None = None) -> list[str]:
    """Megatron's arguments that build the same tokenizer.

    Args:
        config: The tokenizer.
        cache: The data cache, below which a tokenizer's files are laid out as Megatron reads them; None
            for the default one.

    Raises:
        UserError: The tokenizer's file cannot be used, or the cache cannot be written.
    """
    from megaplug.data.cache import cache_root

    return load_tokenizer(config).megatron_arguments(cache if cache is not None else cache_root(None))
