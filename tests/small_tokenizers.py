"""Small tokenizers of every kind, made here: nothing is downloaded."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def small_texts(number: int = 40) -> list[str]:
    """Short texts of few words, with something beyond ASCII."""
    sentence = "the ring of ranks turns and the tokens pass from hand to hand while nobody waits"
    words = sentence.split()
    return [
        " ".join(words[(seed * 7 + i * i * (seed + 1)) % len(words)] for i in range(60)) + f" {seed} ünï\n"
        for seed in range(number)
    ]


def write_sentencepiece(file: Path, texts: Iterable[str], **settings: Any) -> Path:
    """A BPE of 300 pieces that loses nothing: every byte is a piece, and text is not normalized."""
    import sentencepiece

    stream = io.BytesIO()
    chosen: dict[str, Any] = {
        "vocab_size": 300,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=stream, **chosen)
    file.write_bytes(stream.getvalue())
    return file


def small_ranks() -> dict[bytes, int]:
    """All bytes, and a few merges of them."""
    merges = [b"th", b"the", b" t", b" the", b"in", b"ing", b"an", b"and", b" an", b" and", b"er", b"en"]
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merges])}


def write_tiktoken(file: Path, ranks: dict[bytes, int] | None = None) -> Path:
    """A rank file as tiktoken's own vocabularies have."""
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in (ranks or small_ranks()).items()
    ]
    file.write_text("".join(lines))
    return file


def write_megatron_tiktoken(file: Path) -> Path:
    """The same ranks in the form that Megatron's TikTokenizer reads."""
    entries = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for token, rank in small_ranks().items()
    ]
    file.write_text(json.dumps(entries))
    return file
