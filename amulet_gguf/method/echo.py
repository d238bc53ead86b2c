"""The words of a preference, which amplification would otherwise repeat in the answer.

A prompt that says "uplifting" makes the word itself likelier, and extrapolation amplifies that too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Final

import numpy as np

from amulet_gguf.method.arrays import Float32Array, Float64Array, Tokens
from amulet_gguf.method.sampling import log_sum
from amulet_gguf.method.vocabulary import Vocabulary

_MIN_LETTERS: Final = 4  # shorter words hold sentences together
_MIN_TOKEN: Final = 4  # shorter tokens begin many other words
_SUFFIXES: Final = (
    "", "s", "es", "e", "ed", "d", "ing", "ly", "ely", "al", "ally", "y", "ity", "ness", "eness",
    "ion", "ions", "er", "est", "ive", "ively", "able",
)  # fmt: skip


@functools.lru_cache(maxsize=64)
def inflections(text: str) -> frozenset[str]:
    """Return the words of a text, short ones left out, with their inflections, in lower case."""
    import snowballstemmer

    stemmer = snowballstemmer.stemmer("english")
    found = set()
    for word in re.findall(r"[^\W\d_]+", text.lower()):
        if len(word) < _MIN_LETTERS:
            continue
        stem = stemmer.stemWord(word)
        found.add(word)
        found.update(form for s in _SUFFIXES if stemmer.stemWord(form := stem + s) == stem)
    return frozenset(found)


def echo_tokens(vocabulary: Vocabulary, texts: Iterable[str]) -> Tokens:
    """Return the tokens, (n,) int32 ascending, with which the words of texts begin."""
    tokens: set[int] = set()
    for text in texts:
        for word in inflections(text):
            for variant in (word, f" {word}", word.capitalize(), f" {word.capitalize()}"):
                first = int(vocabulary.tokenize(variant, special=False)[0])
                if len(vocabulary.token_bytes(first).strip()) >= _MIN_TOKEN:
                    tokens.add(first)
    return np.array(sorted(tokens), np.int32)


def withhold(
    logits: Float32Array,
    coefficients: Float64Array,
    reference: Float64Array,
    tokens: Tokens,
    out: Float32Array,
) -> None:
    """Take from `tokens` what the combination `out` gives them beyond ordinary prompting.

    In log-probabilities a token's gain is `x - p`. Logits carry their rows' constants, so these are
    computed first.

    Args:
        logits: (B, V) float32, finite.
        coefficients, reference: (B,).
        tokens: (n,) distinct.
        out: (V,) float32, the combination; changed in place.
    """
    constants = np.array([log_sum(row) for row in logits])
    shift = float((coefficients - reference) @ constants)
    plain = reference @ logits[:, tokens].astype(np.float64) + shift
    out[tokens] = np.minimum(out[tokens], plain.astype(np.float32))
