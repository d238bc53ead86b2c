from __future__ import annotations

import math
import socket
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amulet_gguf.errors import SettingError
from amulet_gguf.evaluation import text_measures as module
from amulet_gguf.evaluation.text_measures import MEASURES, preference_stems, text_measures
from amulet_gguf.preferences import PRESETS
from amulet_gguf.settings import PAPER_SYSTEM

LIBRARIES = ("snowballstemmer", "textstat", "vaderSentiment")
COUNTED = list(MEASURES)[list(MEASURES).index("words") : list(MEASURES).index("perplexity")]


def measures(answer: str, preference: str | None = None, system: str | None = None) -> dict[str, float]:
    if preference is not None:
        preference = PRESETS.get(preference, preference)
    return text_measures(answer, is_unfinished=False, preference=preference, system=system)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not imported the libraries yet."""

    def forget() -> None:
        module._readability.cache_clear()
        module._sentiment_analyzer.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] in LIBRARIES]:
            del sys.modules[name]

    forget()
    yield monkeypatch
    forget()


def test_every_measure_is_documented() -> None:
    assert list(MEASURES) == [
        "read_wins", "read_broken", "read_agreement", "words", "grade", "sentiment",
        "distinct_1", "distinct_2", "repetition", "unfinished", "echo",
        "copied", "about_instruction", "perplexity", "reward", "likelihood", "win_rate", "no_judge",
    ]  # fmt: skip
    for name, measure in MEASURES.items():
        assert measure.name == name
        assert measure.better in ("higher", "lower", None)
        assert 0 <= measure.digits <= 4
        assert measure.title
        assert measure.source
        assert measure.limits.endswith(".")


def test_values_come_in_the_order_of_the_measures() -> None:
    assert list(measures("One two.", "formal")) == COUNTED


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", 0),
        (" \n\t", 0),
        ("...!?—", 0),
        ("😀 🎉", 0),
        ("Hello", 1),
        ("It's a well-known fact.", 4),
        ("it’s", 1),
        ("3 cats, 2.5 dogs", 5),  # a decimal point separates
        ("'quoted' -dash-", 2),
        ("snake_case", 2),
        ("Žluťoučký kůň", 2),
        ("e\u0301te\u0301", 1),  # accents as characters of their own
        ("你好,世界。", 2),
    ],
)
def test_words(answer: str, words: int) -> None:
    assert measures(answer)["words"] == words


def test_grade_is_the_formula_of_flesch_and_kincaid() -> None:
    # 6 words of one syllable in a sentence: 0.39 * 6 + 11.8 * 1 - 15.59
    assert measures("The cat sat on the mat.")["grade"] == pytest.approx(-1.45)
    # 7 words in a sentence; pyphen: no hyphenation point but in mat-ter and un-der
    assert measures("The dark matter sat under the mat.")["grade"] == pytest.approx(
        0.39 * 7 + 11.8 * 9 / 7 - 15.59
    )


def test_grade_rises_with_long_words_and_sentences() -> None:
    plain = "We went out. The sun was up. It was a good day for all of us."
    ornate = (
        "Notwithstanding considerable meteorological uncertainty, our collective determination "
        "facilitated an extraordinarily satisfactory excursion throughout the entire afternoon."
    )
    assert measures(plain)["grade"] < 5 < 15 < measures(ornate)["grade"]


def test_items_of_a_list_are_sentences() -> None:
    items = ["- Take the early train", "- Visit the old town", "- Eat in a small place"]
    assert measures("\n".join(items))["grade"] == pytest.approx(
        measures(" ".join(f"{item}." for item in items))["grade"]
    )


def test_sentiment() -> None:
    # One lexicon word: good is 1.9, and the compound x / sqrt(x² + 15).
    assert measures("good")["sentiment"] == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=1e-4)
    assert measures("This is terrible, I hate it.")["sentiment"] < -0.5
    assert measures("The table has four legs.")["sentiment"] == 0
    assert measures("😀")["sentiment"] > 0


def test_sentiment_is_the_mean_of_the_sentences() -> None:
    assert measures("good. The table has legs.")["sentiment"] == pytest.approx(
        measures("good.")["sentiment"] / 2
    )
    # The number of a list is no sentence.
    assert measures("1. good")["sentiment"] == measures("good")["sentiment"]
    # Length alone does not change it.
    assert measures("I like it.\n" * 500)["sentiment"] == pytest.approx(
        measures("I like it.")["sentiment"]
    )


def test_distinct_and_repetition() -> None:
    found = measures("A b a B c")  # words a b a b c; pairs ab ba ab bc; 4-grams abab babc
    assert found["distinct_1"] == pytest.approx(3 / 5)
    assert found["distinct_2"] == pytest.approx(3 / 4)
    assert found["repetition"] == 0
    # Six times the same word: pairs 1 of 5, 4-grams 1 of 3.
    found = measures("la " * 6)
    assert found["distinct_2"] == pytest.approx(1 / 5)
    assert found["repetition"] == pytest.approx(2 / 3)


def test_a_loop_is_repetition() -> None:
    assert measures("I'm not here to help you. " * 50)["repetition"] > 0.95


@pytest.mark.parametrize("is_unfinished", [True, False])
def test_unfinished(is_unfinished: bool) -> None:
    assert text_measures("Half a", is_unfinished=is_unfinished)["unfinished"] == is_unfinished


@pytest.mark.parametrize("answer", ["", "  \n", "\u3000"])
def test_an_empty_answer(answer: str) -> None:
    found = measures(answer, "creative", "You are an AI.")
    defined = {name: value for name, value in found.items() if not math.isnan(value)}
    assert defined == {"words": 0, "unfinished": 0, "about_instruction": 0}


def test_one_word() -> None:
    found = measures("Yes", "creative", "You are an AI.")
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {"distinct_2", "repetition", "copied"}
    assert (found["words"], found["distinct_1"], found["echo"]) == (1, 1, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_one_stem(name: str) -> None:
    assert len(preference_stems(PRESETS[name])) == 1
    assert preference_stems(PRESETS[name]) == preference_stems(name)


@pytest.mark.parametrize(
    ("preference", "inflections", "others"),
    [
        ("complex", "Complex complexity complexities", "simple complicated"),
        ("concise", "concise concisely conciseness concision", "precise decision"),
        ("creative", "creative Creatively creativity CREATIVENESS", "create creation creature"),
        ("formal", "formal formally formality formalities", "form format informal formula"),
        ("pleasant", "pleasant pleasantly pleasantness", "please pleasing pleasure"),
        ("sycophantic", "sycophantic sycophant sycophants sycophancy sycophantically", "sympathetic"),
        ("uplifting", "uplifting uplifted uplift uplifts", "lift lifting up"),
        ("verbose", "verbose verbosely verbosity", "verb verbal verbatim"),
        # Known to be missed, and said so in MEASURES["echo"].limits.
        ("complex", "", "complexly"),
        ("pleasant", "", "pleasantest pleasantries unpleasant"),
    ],
)
def test_echo_counts_inflections(preference: str, inflections: str, others: str) -> None:
    for word in inflections.split():
        assert measures(word, preference)["echo"] == 100, word
    for word in others.split():
        assert measures(word, preference)["echo"] == 0, word


def test_echo_is_per_100_words() -> None:
    answer = "A creative idea: a creative-sounding title. " + "word " * 14
    assert measures(answer, "creative")["echo"] == pytest.approx(100 * 2 / 20)


def test_echo_of_a_preference_in_ones_own_words() -> None:
    preference = "Please answer as if you were writing for a child of six."
    assert preference_stems(preference) >= {"child", "six"}
    assert measures("Your answer should be as much as possible for you.", preference)["echo"] == 0
    assert measures("Six children, one child's toy", preference)["echo"] == pytest.approx(100 * 2 / 5)


@pytest.mark.parametrize("preference", ["", "Your answer should be as much as possible.", "!", "😀"])
def test_a_preference_without_content_words(preference: str) -> None:
    assert preference_stems(preference) == frozenset()
    found = measures("Some answer.", preference)
    assert math.isnan(found["echo"])
    assert math.isnan(found["about_instruction"])


def test_without_a_preference_or_system_prompt() -> None:
    found = measures("One two three four five six.")
    assert {name for name, value in found.items() if math.isnan(value)} == {
        "echo",
        "copied",
        "about_instruction",
    }


def test_copied() -> None:
    # 5-grams of a..g: abcde bcdef cdefg; the first two are in the system prompt.
    assert measures("A b, c d e f g", system="x a b c d e f y")["copied"] == pytest.approx(2 / 3)
    assert measures("one two three four five", system="short prompt")["copied"] == 0
    assert math.isnan(measures("one two three four five", system=" ")["copied"])
    assert math.isnan(measures("one two three four", system="one two three four five")["copied"])
    assert measures(PAPER_SYSTEM, system=PAPER_SYSTEM)["copied"] == 1


@pytest.mark.parametrize(
    ("preference", "answer"),
    [
        ("creative", "To be as creative as possible, start with a poem."),
        ("uplifting", "Finding a hobby can be uplifting as much as possible:"),
        ("creative", "Here are creative, user-friendly advice"),
        ("concise", "Here is a concise answer: yes."),
        ("concise", "Here’s a clear and **concise** answer:\n\n1. Yes."),
        ("verbose", "Sure! Here's a verbose explanation of how tides work."),
        ("formal", "Your answer should be as formal as you can make it."),
        ("formal", "My response will be written formally."),
        ("pleasant", "I will try to be pleasant. The tides come twice a day."),
        ("uplifting", "You can ask for a raise in a warm, uplifting way."),
        ("complex", "Complex answer: tides are a resonance."),
        ("verbose", "A verbose description of tides."),
        ("Write for a pirate.", "Here is a pirate version."),
    ],
)
def test_parroting_is_seen(preference: str, answer: str) -> None:
    found = measures(answer, preference)
    assert found["about_instruction"] == 1
    assert found["echo"] > 0


@pytest.mark.parametrize(
    ("preference", "answer"),
    [
        ("creative", "Imagine the sea as a sleeping giant whose chest rises twice a day."),
        ("uplifting", "You have worked hard, and it shows! Walk in with your head held high."),
        ("concise", "Twice a day; the Moon pulls, the Earth turns."),
        ("formal", "One should request a meeting and present the relevant accomplishments."),
        ("pleasant", "What a lovely question! Let me show you a small garden to begin with."),
        ("verbose", "Here are five tips, each of which I shall now unfold at considerable length."),
        ("sycophantic", "What a brilliant question, worthy of your genius! The answer is 42."),
        ("complex", "Here is how tides work: as much as possible, water follows the Moon."),
    ],
)
def test_following_is_not_parroting(preference: str, answer: str) -> None:
    found = measures(answer, preference)
    assert (found["echo"], found["about_instruction"]) == (0, 0)


@pytest.mark.parametrize(
    "answer",
    [
        "The novel is about a creative child who draws on walls.",
        "Here are five tips for creative writing.",
        "Creativity grows with practice. Use your mornings as much as possible.",
        "The answer is 42.",
    ],
)
def test_using_the_word_is_not_talking_about_the_instruction(answer: str) -> None:
    assert measures(answer, "creative")["about_instruction"] == 0


def test_chinese() -> None:
    answer = "你可以直接和经理谈谈。先准备好你的成绩!"
    found = measures(answer, "请尽量简洁", "你是一个助手。")
    assert found["words"] == 2
    assert found["about_instruction"] == 0
    assert measures("请尽量简洁", "请尽量简洁")["echo"] == 100


@pytest.mark.parametrize(
    "piece",
    ["a", "!", "\n", "😀", "创意", "y", "a-", "creative ", "here is ", "my answer is ",
     "as much as possible ", "in a ", "I love it but ", "great ", "_", "\u0301", "'", "2."],
)  # fmt: skip
def test_a_hundred_thousand_characters(piece: str) -> None:
    # What a quadratic step would turn into minutes; the timeout of the tests is the limit.
    found = measures(piece * (100_000 // len(piece)), "creative", PAPER_SYSTEM)
    assert list(found) == COUNTED


words = st.sampled_from([
    "a", "the", "creative", "creatively", "answer", "is", "here's", "your", "as", "much", "possible,",
    "good", "bad;", "1.", "😀", "你好", "--", "but\n",
])  # fmt: skip
texts = st.one_of(st.text(max_size=300), st.lists(words, max_size=60).map(" ".join))


@given(texts, st.booleans(), st.none() | texts, st.none() | texts)
@example("\ud800", False, "\udfff", "\x00")
@example("İ", False, "İ", None)
@example("ß’s", False, "s", "")
def test_ranges(answer: str, is_unfinished: bool, preference: str | None, system: str | None) -> None:
    found = text_measures(answer, is_unfinished=is_unfinished, preference=preference, system=system)
    highest = {"words": len(answer) + 1, "grade": math.inf, "echo": 100.0}
    lowest = {"grade": -3.4, "sentiment": -1.0}  # the grade of words of one syllable, one a sentence
    assert list(found) == COUNTED
    for name, value in found.items():
        assert isinstance(value, float)
        if not math.isnan(value):
            assert lowest.get(name, 0.0) - 1e-9 <= value <= highest.get(name, 1.0) + 1e-9, name
    assert not any(math.isnan(found[name]) for name in ("words", "unfinished"))
    assert math.isnan(found["grade"]) == math.isnan(found["distinct_1"]) == (found["words"] == 0)
    assert math.isnan(found["sentiment"]) == (not answer.strip())
    if found["echo"] == 0:
        assert found["about_instruction"] == 0


@given(texts, st.sampled_from(sorted(PRESETS)))
def test_case_does_not_matter(answer: str, name: str) -> None:
    answer = "".join(letter for letter in answer if letter in string.printable)
    lower, upper = measures(answer.lower(), name), measures(answer.upper(), name)
    for measure in set(COUNTED) - {"grade", "sentiment"}:
        assert lower[measure] == pytest.approx(upper[measure], nan_ok=True), measure


@given(texts, texts)
def test_a_preference_and_system_prompt_change_only_their_own_measures(answer: str, given: str) -> None:
    bare, full = measures(answer), measures(answer, given, given)
    for name in set(COUNTED) - {"echo", "copied", "about_instruction"}:
        assert full[name] == pytest.approx(bare[name], nan_ok=True), name


def test_without_network(fresh: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the network was used")

    fresh.setattr(socket, "socket", refuse)
    fresh.setattr(socket, "getaddrinfo", refuse)
    found = measures("Here is a creative, good and long answer.", "creative", PAPER_SYSTEM)
    assert not any(map(math.isnan, found.values()))


@pytest.mark.parametrize(
    "name", ["snowballstemmer", "textstat.textstat", "vaderSentiment.vaderSentiment"]
)
def test_a_missing_library_names_the_extra(fresh: pytest.MonkeyPatch, name: str) -> None:
    fresh.setitem(sys.modules, name, None)
    with pytest.raises(SettingError, match=r"^evaluation needs pip install 'amulet-gguf\[eval\]'"):
        measures("Some words.", "creative")


@pytest.mark.parametrize(
    ("warning", "is_silent"),
    [
        ("'pkg_resources is deprecated as an API.', UserWarning", True),
        ("'pkg_resources is deprecated as an API.', DeprecationWarning", True),
        ("'some other'", False),
    ],
)
def test_only_the_warning_about_pkg_resources_is_silenced(
    tmp_path: Path, warning: str, is_silent: bool
) -> None:
    (tmp_path / "textstat").mkdir()
    (tmp_path / "textstat" / "__init__.py").touch()
    (tmp_path / "textstat" / "textstat.py").write_text(
        f"import warnings\nwarnings.warn({warning})\n"
        "class textstatistics:\n"
        "    def set_rounding(self, rounding): pass\n"
        "    def flesch_kincaid_grade(self, text): return 7\n"
    )
    # In its own process: Python keeps the filters under which it warned last until it exits.
    code = (
        f"import sys, warnings; sys.path[:0] = {[str(tmp_path), *sys.path]!r}\n"
        "from amulet_gguf.evaluation.text_measures import text_measures\n"
        "warnings.simplefilter('error')\n"
        "assert text_measures('Words.', is_unfinished=False)['grade'] == 7\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == is_silent, done.stderr
    assert ("some other" in done.stderr) != is_silent
