"""Texts for the tests of this room, the same every time."""

from __future__ import annotations

SENTENCE = "the ring of ranks turns and the tokens pass from hand to hand while nobody waits"
WORDS = SENTENCE.split()


def some_text(seed: int, words: int = 60) -> str:
    return (
        " ".join(WORDS[(seed * 7 + i * i * (seed + 1)) % len(WORDS)] for i in range(words)) + f" {seed} ünï\n"
    )
