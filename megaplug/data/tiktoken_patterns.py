"""The regular expressions by which published tiktoken vocabularies cut text before they merge bytes."""

from __future__ import annotations

from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

PATTERNS = {
    # tiktoken_ext/openai_public.py of tiktoken 0.14
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k_base": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # llama_models/llama3/api/tokenizer.py
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # megatron/core/tokenizers/text/libraries/tiktoken_tokenizer.py of Megatron-core 0.19
    "v1": (r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
    "v2": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

_PROBES = (
    *(
        "a",
        "Zebra",
        "größe",
        "Ω",
        "語",
        "é",
        "7",
        "1234",
        ".",
        "(x_y)",
        " ",
        "  \t ",
        "\n",
        "\r\n\r\n",
        "🙂",
        "\x00",
    ),
    "'s",
)


def lost_text(encoding: Any) -> str | None:
    """A text that an encoding loses, because its pattern matches no part of it; None if all is well.

    Args:
        encoding: A ``tiktoken.Encoding``.
    """
    whole = "".join(_PROBES)
    if encoding.decode(encoding.encode_ordinary(whole)) == whole:
        return None
    for probe in _PROBES:
        if encoding.decode(encoding.encode_ordinary(probe)) != probe:
            return probe
    return whole
