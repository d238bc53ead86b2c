"""What is a name, a number, a quotation or code in an answer, and that it is written as prompted."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.method.facts import Facts
from amulet_gguf.method.mixture import Fade, Mixture, coefficients

LOGITS = np.random.default_rng(0).normal(0, 3, (2, 64)).astype(np.float32)

# Tokens in brackets are facts, and so is ⏎ instead of a new line; a token is a space with letters, a
# part of a word behind "+", or a sign.
MARKED = [
    "We met <Ada> <Love><+lace> in <1><+8><+43> .",
    "The bridge of <Salez> is by <Robert> <Maillart> . It has <3> . <5> million stones .",
    "I know that I am here , said <Bob> .",
    "He is here . She is not . Is he ? No ! Yes : Maybe .",
    '- Walk to <Rome>\n- Eat\n* ** Bold ** word\n1 . Sleep\n1+2 . Wake\n# Big <Title>',
    '" Go , " she said , " to <Bob> <Smith> . "\n“ Never ! ”',
    'He is <6>+\'<+2>+" tall and here .',
    'He said " <go> <away> <"> and left .',
    'An open " <quotation> <ends>⏎with its line .',
    "The “ <old> <way> <”> and « <the> <new> <»> here .",
    "Call ` <f> <(> <x> <)> <`> now .",
    "Like this :\n```<python>⏎<x> <=> <y>⏎⏎<if> <x>⏎<```>⏎and so on .",
    "an iPhone is dear",
    "i+Phone x+2 are not",
    "über <Öster><+reich> und <Москв><+а> .",
    "東京 は 日本 の <3> つ 。 Also this .",
]  # fmt: skip


def tokens(marked: str) -> list[tuple[bytes, bool]]:
    """Return tokens with whether each is a fact."""
    found = []
    spaced = ""
    for part in re.findall(r"<```>|<[^<>\s]+>|[\n ⏎]|```|[^\s<>+⏎]+|\+[^\s<>⏎]+", marked):
        if part == " ":
            spaced = " "
            continue
        is_fact = part[0] in "<⏎"
        text = part.strip("<>").removeprefix("+").replace("⏎", "\n")
        found.append(((spaced + text).encode(), is_fact))
        spaced = ""
    return found


@pytest.mark.parametrize("marked", MARKED)
def test_facts_are_told_by_how_they_are_written(marked: str) -> None:
    facts, told = Facts(), []
    for token, _ in tokens(marked):
        told.append((token, facts.include(token)))
        facts.push(token)
    assert told == tokens(marked)


def test_a_name_that_another_word_stands_for_does_not_go_on() -> None:
    facts = Facts()
    facts.push(b"We met")
    assert facts.include(b" Ada")
    facts.push(b" a")
    assert not facts.include(b"lace")


@given(st.lists(st.binary(max_size=9), max_size=40))
def test_any_bytes_are_read(written: list[bytes]) -> None:
    facts = Facts()
    for token in written:
        assert facts.include(token) == facts.include(token)
        facts.push(token)


def mixture(strength: float, weights: tuple[float, ...] = (1.0,)) -> Mixture:
    return Mixture(
        coefficients(weights, strength),
        coefficients(weights, 1.0),
        0.3,
        fade=Fade(strength, 0.5, 4.0),
        at=lambda s: coefficients(weights, s),
    )


def rows(mixture: Mixture, facts: list[bool]) -> list[np.ndarray]:
    found = []
    for is_fact in facts:
        row = np.empty(LOGITS.shape[1], np.float32)
        mixture.combine(LOGITS[list(mixture.needed)], row, lambda token, told=is_fact: told)  # type: ignore[misc]
        found.append(row)
    return found


@given(st.floats(-3, 9), st.lists(st.booleans(), min_size=1, max_size=12))
def test_facts_have_the_logits_of_prompting_and_the_rest_its_own(
    strength: float, facts: list[bool]
) -> None:
    plain = rows(mixture(strength), [False] * len(facts))
    fade = Fade(strength, 0.5, 4.0)
    for t, (row, other) in enumerate(zip(rows(mixture(strength), facts), plain, strict=True)):
        expected = LOGITS[1] if facts[t] and fade.at(t) > 1 else other
        np.testing.assert_array_equal(row, expected)


def test_what_leads_away_from_a_preference_is_left_alone() -> None:
    """Ordinary prompting with a negative preference is extrapolation itself."""
    away, plain = mixture(4.0, (-1.0,)), mixture(4.0, (-1.0,))
    for one, other in zip(rows(away, [True] * 5), rows(plain, [False] * 5), strict=True):
        np.testing.assert_array_equal(one, other)
