"""What an evaluation reports, and the part of it that can be read off an answer without a model."""

from __future__ import annotations

import importlib
import math
import re
import statistics
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

from amulet_gguf.errors import SettingError


@dataclass(frozen=True)
class Measure:
    """What a number in an evaluation is.

    Attributes:
        name: its key in `MEASURES` and in results.
        title: what it is, with its unit or range.
        better: which direction is better, None where that depends on the preference.
        digits: decimal places worth showing.
        source: where it comes from.
        limits: what it cannot tell.
    """

    name: str
    title: str
    better: Literal["higher", "lower"] | None
    digits: int
    source: str
    limits: str


#: Every measure, in the order of a report. `text_measures` computes words to about_instruction;
#: the others take readers (read_*), a scoring model (perplexity, reward, likelihood) or a judge (the
#: last two).
# fmt: off
MEASURES: Final[dict[str, Measure]] = {measure.name: measure for measure in (
    Measure("read_wins", "share of comparisons that readers gave it against the opponent, ties half, "
        "0 to 1", "higher", 2,
        "people who ranked the answers blind (amulet eval --read)",
        "Few readers and questions: look at the intervals. All measures behind these three are warnings "
        "only: they have misled before."),
    Measure("read_broken", "share of answers that readers called broken, 0 to 1", "lower", 2,
        "people who ranked the answers blind",
        "What is broken and what is only bad is for each to say."),
    Measure("read_agreement", "share of its pairs that readers order alike, 0 to 1", "higher", 2,
        "people who ranked the answers blind",
        "Near copies are ordered by chance: it need not be high."),
    Measure("words", "words per answer", None, 0,
        "runs of letters and digits, joined by apostrophes and hyphens",
        "In scripts without spaces, all between two punctuation marks is one word."),
    Measure("grade", "Flesch-Kincaid grade, US school years", None, 1,
        "Kincaid et al. 1975, by textstat; a line break ends a sentence",
        "English only: long words and sentences, not difficult thoughts; abbreviations end one."),
    Measure("sentiment", "sentiment: VADER compound, mean over sentences, −1 to 1", None, 2,
        "Hutto & Gilbert 2014, by vaderSentiment",
        "A lexicon of English social media: sees friendly words, not irony or what is said."),
    Measure("distinct_1", "distinct-1: distinct words / words, 0 to 1", "higher", 2,
        "Li et al. 2016, arXiv 1510.03055, per answer",
        "Falls with length: compare answers of similar length only."),
    Measure("distinct_2", "distinct-2: distinct word pairs / word pairs, 0 to 1", "higher", 2,
        "Li et al. 2016, arXiv 1510.03055, per answer",
        "Falls with length, and random words score highest."),
    Measure("repetition", "share of word 4-grams that repeat an earlier one, 0 to 1", "lower", 3,
        "seq-rep-4: Welleck et al. 2020, arXiv 1908.04319, on words",
        "Blind to repetition in other words, and it counts refrains and tables too."),
    Measure("unfinished", "share of answers that the token limit cut off, 0 to 1", "lower", 2,
        "the reason why the generation ended",
        "Depends on the limit, and an answer that stops in the middle of a thought counts as finished."),
    Measure("echo", "words of the preference and their inflections per 100 words, 0 to 100", "lower", 2,
        "this project, by Snowball stems (Porter 2001)",
        "English only; misses complexly, pleasantest, pleasantries and prefixed words (unpleasant), and "
        "counts a word that the question asks for too."),
    Measure("copied", "share of word 5-grams that occur in the system prompt, 0 to 1", "lower", 3,
        "this project: n-gram overlap",
        "Paraphrases are not seen, and common phrases of five words may coincide."),
    Measure("about_instruction", "share of answers that talk about the preference, 0 to 1", "lower", 2,
        "this project: a list of patterns around the words of the preference",
        "A heuristic that only knows English, misses synonyms (a brief answer) and takes advice to the "
        "reader (be as concise as possible) for an announcement."),
    Measure("perplexity", "perplexity per token without the preference, 1 up", "lower", 1,
        "exp(−mean log P(answer | base prompt)) under a scoring model: Jelinek et al. 1977",
        "Low means ordinary, not good: degenerate repetition scores low, a style of its own high."),
    Measure("reward", "implicit reward per token, nats", "higher", 3,
        "mean log P(answer | preference prompt) − log P(answer | base prompt) under a model other than "
        "the writer; DPO's implicit reward: Rafailov et al. 2023, arXiv 2305.18290",
        "An answer that parrots the instruction scores high: read it with likelihood and echo."),
    Measure("likelihood", "log P(answer | preference prompt) per token, nats, up to 0", "higher", 3,
        "mean log-likelihood under a scoring model",
        "Favours ordinary and repetitive text, as perplexity does."),
    Measure("win_rate", "share of comparisons won against the opponent, 0 to 1", "higher", 2,
        "a judge model that reads both orders and agrees with itself: "
        "Zheng et al. 2023, arXiv 2306.05685",
        "Small judges are weak and favour length and position (Wang et al. 2023, arXiv 2305.17926): "
        "it says nothing where they are no judge in many pairs."),
    Measure("no_judge", "share of pairs in which the judge contradicts itself when the order is "
        "swapped, 0 to 1", "lower", 2,
        "position bias: Wang et al. 2023, arXiv 2305.17926",
        "Consistent is not correct: a judge that always takes the longer answer agrees with itself."),
)}
# fmt: on

_WORD: Final = re.compile(r"[^\W_]+(?:['’\-‐‑][^\W_]+)*")
_HYPHEN: Final = re.compile(r"[-‐‑]")
_SENTENCE_END: Final = re.compile(r"(?<=[^\d\s][.!?])\s+|[\r\n]+")  # "1. Rest" is one sentence
_PIECE: Final = re.compile(r"\S.{0,299}(?!\S)|\S.{0,299}", re.DOTALL)

#: Words of a preference that say nothing about style, the frame of the preset sentences among them.
_STOP_WORDS: Final = frozenset((
    "a", "about", "all", "always", "an", "and", "any", "are", "as", "at", "avoid", "be", "but", "by",
    "can", "do", "don't", "each", "every", "for", "from", "give", "has", "have", "how", "i", "if", "in",
    "into", "is", "it", "its", "keep", "less", "like", "make", "many", "me", "more", "most", "much",
    "must", "my", "never", "no", "not", "of", "on", "one", "only", "or", "please", "possible", "should",
    "so", "some", "than", "that", "the", "their", "them", "they", "this", "to", "too", "try", "use",
    "very", "was", "what", "when", "who", "will", "with", "without", "would", "write", "you", "your",
    "answer", "answers", "reply", "replies", "respond", "response", "responses",
))  # fmt: skip

# These read lower-cased text in which every word of the preference is replaced by PREFERRED. All need
# such a word, so that "the answer is 42" and "here are five tips" pass.
_ABOUT_INSTRUCTION: Final = tuple(
    re.compile(pattern)
    for pattern in (
        # "as creative as possible", "is uplifting as much as possible"
        r"\bas PREFERRED as (?:possible|i can)\b",
        r"PREFERRED[^.!?]{0,60} as much as possible\b|\bas much as possible[^.!?]{0,60} PREFERRED",
        # "Your answer should be concise", "My reply is going to be formal"
        r"\b(?:your|my|the|this) (?:answer|response|reply)"
        r" (?:should|must|needs to|has to|will be|is)\b[^.!?]{0,60} PREFERRED",
        # "Here is a concise answer:", "Here are creative, user-friendly advice"; not "tips for …"
        r"\bhere(?:'s| is| are)"
        r"(?: (?!(?:about|for|how|in|of|on|that|to|what|why|with)\b)[\w'-]+,?){0,4} PREFERRED",
        # "A verbose explanation of tides:", "this is a formal and polite response"
        r"PREFERRED(?:,? [\w'-]+){0,2} (?:answer|response|reply)\b",
        r"^(?:sure\W+)?(?:an?|the|my|your) PREFERRED (?:description|explanation|summary|version)\b",
        # "in a creative way", "in a warm and uplifting tone"
        r"\bin an? (?:[\w'-]+,? ){0,2}PREFERRED(?:,? [\w'-]+){0,2} (?:fashion|manner|style|tone|way)\b",
        # "I will try to be concise", "Let me give you a creative …"
        r"\b(?:i'll|i will|let me|i'm going to)"
        r" (?:try to )?(?:answer|be|explain|give|keep|provide|write)\b[^.!?]{0,30} PREFERRED",
    )
)


def text_measures(
    answer: str, *, is_unfinished: bool, preference: str | None = None, system: str | None = None
) -> dict[str, float]:
    """Measure one answer: the entries of `MEASURES` from words to about_instruction, in their order.

    A value is NaN where it is undefined: counts of words in an answer without words or with fewer than
    the n-gram has, the sentiment of an empty answer, echo and about_instruction without a preference
    (or one without content words), copied without a system prompt.

    Args:
        answer: the text as the model wrote it.
        is_unfinished: whether the token limit ended it.
        preference: the text of the preference it was written for.
        system: the system prompt it was written under.

    Raises:
        SettingError: the libraries of the extra "eval" are not installed.
    """
    answer = _normalized(answer)
    words = _words(answer)
    stems = preference_stems(preference) if preference is not None else frozenset()
    preferred = _preferred(words, stems)
    echoes = sum(word in preferred for word in words)
    return {
        "words": float(len(words)),
        "grade": _grade(answer) if words else math.nan,
        "sentiment": _sentiment(answer) if answer.strip() else math.nan,
        "distinct_1": _distinct(words, 1),
        "distinct_2": _distinct(words, 2),
        "repetition": 1.0 - _distinct(words, 4),
        "unfinished": float(is_unfinished),
        "echo": 100.0 * echoes / len(words) if words and stems else math.nan,
        "copied": _copied(words, _words(_normalized(system or ""))),
        "about_instruction": float(_is_about(answer, preferred)) if stems else math.nan,
    }


def preference_stems(preference: str) -> frozenset[str]:
    """Return the stems of a preference's content words: {"creativ"} for the preset creative.

    Words are stemmed for English; words in other languages match nearly as they are written. The set is
    empty where nothing but function words is left.

    Raises:
        SettingError: the libraries of the extra "eval" are not installed.
    """
    words = set(_words(_normalized(preference))) - _STOP_WORDS
    parts = {part for word in words for part in _HYPHEN.split(word)} - _STOP_WORDS
    return frozenset(_stems(parts).values())


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("’", "'")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _stems(words: Iterable[str]) -> dict[str, str]:
    # A stemmer keeps its word in itself: one per call makes this safe in threads.
    stem = _library("snowballstemmer").stemmer("english").stemWord
    # Twice, because sycophantic becomes sycophant, and that sycoph.
    return {word: stem(stem(word)) for word in words}


def _preferred(words: Iterable[str], stems: frozenset[str]) -> frozenset[str]:
    """Return the words that are inflections of the preference's, or compounds with one of them."""
    if not stems:
        return frozenset()
    parts = {word: _HYPHEN.split(word) for word in words}
    stem_of = _stems({part for split in parts.values() for part in split})
    return frozenset(
        word for word, split in parts.items() if any(stem_of[part] in stems for part in split)
    )


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _distinct(words: Sequence[str], n: int) -> float:
    ngrams = _ngrams(words, n)
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def _copied(words: Sequence[str], system: Sequence[str]) -> float:
    ngrams = _ngrams(words, 5)
    if not ngrams or not system:
        return math.nan
    given = set(_ngrams(system, 5))
    return sum(ngram in given for ngram in ngrams) / len(ngrams)


def _is_about(answer: str, preferred: frozenset[str]) -> bool:
    def mark(match: re.Match[str]) -> str:
        return "PREFERRED" if match[0] in preferred else match[0]

    # Emphasis and quotation marks stand between words: a **concise** answer.
    plain = " ".join(re.sub(r'[*_`"“”]', "", answer.lower()).split())
    marked = _WORD.sub(mark, plain)
    return any(pattern.search(marked) for pattern in _ABOUT_INSTRUCTION)


def _grade(answer: str) -> float:
    # Lists and headings have no full stops; without this a list is one sentence of a hundred words.
    sentences = ".\n".join(answer.splitlines())
    return float(_readability().flesch_kincaid_grade(sentences))


def _sentiment(answer: str) -> float:
    # The authors' way with more than a sentence. A sum over all words would come near 1 in any long
    # friendly answer, and VADER takes quadratic time.
    pieces = [piece for sentence in _SENTENCE_END.split(answer) for piece in _PIECE.findall(sentence)]
    scores = {piece: _sentiment_analyzer().polarity_scores(piece)["compound"] for piece in set(pieces)}
    return statistics.fmean(scores[piece] for piece in pieces)


@lru_cache(maxsize=1)
def _readability() -> Any:
    # Its own object: the module's rounds syllables per word to a tenth, which is 1.2 grades.
    readability = _library("textstat.textstat").textstatistics()
    readability.set_rounding(False)
    return readability


@lru_cache(maxsize=1)
def _sentiment_analyzer() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"codecs\.open", DeprecationWarning)  # Python 3.14
        return _library("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*pkg_resources")  # textstat imports it
            return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(f"evaluation needs pip install 'amulet-gguf[eval]' ({error})") from error
