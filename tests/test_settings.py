from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.errors import SettingError
from amulet_gguf.method.realign import strength
from amulet_gguf.preferences import PRESETS, Preference
from amulet_gguf.prompts.messages import with_preference
from amulet_gguf.settings import PAPER_SYSTEM, SETTINGS, Options, Settings

FIELDS = [field.name for field in dataclasses.fields(Settings)]
WHOLE = [name for name, each in SETTINGS.items() if each.kind == "whole"]
HUGE = 10**400  # no float can hold it
RANGES = {name: (each.low, each.high) for name, each in SETTINGS.items() if each.is_number}
NUMBERS = list(RANGES)
LIMITS = [(name, limit) for name, limits in RANGES.items() for limit in limits]


def test_options_are_the_fields_of_settings() -> None:
    assert list(Options.__annotations__) == FIELDS
    assert not Options.__required_keys__
    assert list(SETTINGS) == FIELDS


def beyond(name: str, limit: float) -> float:
    """The nearest number of the field's kind outside its range."""
    low = limit == RANGES[name][0]
    if name in WHOLE:
        return limit - 1 if low else limit + 1
    return math.nextafter(limit, -math.inf if low else math.inf)


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_limits_are_accepted(name: str, limit: float) -> None:
    assert getattr(Settings(**{name: limit}), name) == limit  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_the_next_number_beyond_a_limit_is_refused(name: str, limit: float) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be"):
        Settings(**{name: beyond(name, limit)})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, "1", b"1", True, False, [1], 1j, 10**400]
)
def test_what_is_no_number_is_refused(name: str, bad: Any) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be a (whole )?number from .* to .*, got "):
        Settings(**{name: bad})


@pytest.mark.parametrize("name", NUMBERS)
def test_messages_give_the_range_exactly(name: str) -> None:
    with pytest.raises(SettingError) as error:
        Settings(**{name: "?"})  # type: ignore[arg-type]
    noun = "whole number" if name in WHOLE else "number"
    message = str(error.value).replace(", or auto", "").replace(", or none", "")
    match = re.fullmatch(rf"{name} must be a {noun} from (\S+) to (\S+), got '\?'", message)
    assert match
    found = [Fraction(limit.replace(",", "").replace("_", "")) for limit in match.groups()]
    assert found == [Fraction(str(limit)) for limit in RANGES[name]]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_not_floats(name: str) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be a whole number"):
        Settings(**{name: 5.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    sorted(
        set(FIELDS)
        - {
            "prefer",
            "avoid",
            "system",
            "seed",
            "strength",
            "fade",
            "fade_to",
            "logit_bias",
            "template_args",
            "date",
            "think",
            "think_effort",
            "think_tokens",
            "schema",
            "regex",
            "grammar",
        }
    ),
)
def test_none_is_refused_where_it_has_no_meaning(name: str) -> None:
    with pytest.raises(SettingError):
        Settings(**{name: None})  # type: ignore[arg-type]


def test_none_where_it_has_a_meaning() -> None:
    settings = Settings(prefer=None, system=None, seed=None)
    assert settings == Settings()
    assert settings.prefer == ()


# --- texts ---


def test_stop_strings_are_one_or_several() -> None:
    assert Settings(stop="END").stop == ("END",)
    assert Settings(stop=["a", "\n"]).stop == ("a", "\n")
    assert Settings(stop=(text for text in ("a", " "))).stop == ("a", " ")
    assert Settings(stop=[]).stop == ()


@pytest.mark.parametrize("bad", ["", [""], ["a", ""], [None], [5], ["a", b"b"], b"END", 5, None])
def test_unusable_stop_strings_are_refused(bad: Any) -> None:
    with pytest.raises(SettingError, match="stop"):
        Settings(stop=bad)


@pytest.mark.parametrize("bad", ["", "Turn", "user", 0, None, ["turn"]])
def test_unknown_placements_are_refused(bad: Any) -> None:
    for good in ("turn", "system"):
        assert Settings(placement=good).placement == good
    with pytest.raises(SettingError, match="placement must be one of turn, system, got"):
        Settings(placement=bad)


def test_system_is_a_text_or_none() -> None:
    assert Settings(system="").system == ""
    for bad in (5, b"text", ["text"]):
        with pytest.raises(SettingError, match="system must be a text or None, got"):
            Settings(system=bad)  # type: ignore[arg-type]


# --- preferences and strength together ---


def test_prefer_is_brought_into_one_form() -> None:
    expected = (Preference("concise"), Preference("Be bold.", 0.5))
    assert Settings(prefer=["concise", "Be bold.:0.5"]).prefer == expected
    assert Settings(prefer=("concise", 2)).prefer == (Preference("concise", 2),)
    with pytest.raises(SettingError, match="did you mean 'concise'"):
        Settings(prefer="consise")


def weighted(s: float, weights: list[float]) -> Settings:
    return Settings(strength=s, prefer=[("Be bold.", w) for w in weights])


@pytest.mark.parametrize(
    ("s", "weights", "beyond"),
    [
        (1000, [1], [1.01]),
        (1000, [0.5, -0.5], [0.5, -0.51]),  # pushing away counts as much
        (-100, [10], [10, 0.01]),
        (125, [1] * 8, [1] * 7 + [-1.01]),
        (12.5, [10] * 8, None),
        (0, [10] * 8, None),
    ],
)
def test_strength_times_weights_has_a_limit(
    s: float, weights: list[float], beyond: list[float] | None
) -> None:
    assert [preference.weight for preference in weighted(s, weights).prefer] == weights
    if beyond:
        with pytest.raises(SettingError, match="too large: lower one of them"):
            weighted(s, beyond)


@given(st.floats(0, 1000), st.floats(-1, 1))
def test_one_weight_up_to_one_allows_every_strength(s: float, weight: float) -> None:
    assert Settings(strength=s, prefer=("Be bold.", weight)).strength == s


# --- grammars ---


def test_a_schema_is_brought_into_one_form() -> None:
    class Pet:
        """As pydantic's models are."""

        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object"}

    schemas: list[Any] = [{"type": "object"}, '{"type":  "object"}', Pet]
    assert {Settings(schema=each).schema for each in schemas} == {'{"type": "object"}'}
    wrong: list[Any] = ["{", "[]", "3", True, [], {"a": {1}}, {"a": float("nan")}, {"a": "x" * 300_000}]
    for bad in wrong:
        with pytest.raises(SettingError, match="schema"):
            Settings(schema=bad)


def test_one_grammar_is_enough() -> None:
    with pytest.raises(SettingError, match="schema and regex exclude each other"):
        Settings(schema={}, regex="a")
    empty: list[dict[str, Any]] = [{"regex": ""}, {"grammar": ""}]
    for options in empty:
        with pytest.raises(SettingError, match="1 to 262144 characters"):
            Settings(**options)


# --- the whole ---


def test_settings_do_not_change_and_can_be_replaced() -> None:
    settings = Settings(prefer="concise:0.5", stop="END", seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.strength = 2.0  # type: ignore[misc]
    assert settings.replace() == settings
    assert len({settings, settings.replace(seed=1), settings.replace(seed=2)}) == 2
    with pytest.raises(SettingError):
        settings.replace(top_p=2)


def test_the_papers_settings() -> None:
    assert dataclasses.asdict(Settings.paper("creative")) == {
        "prefer": ({"text": PRESETS["creative"], "weight": 1.0},),
        "avoid": None,
        "strength": strength(),
        "fade": 0.0,
        "fade_to": None,
        "plausibility": 0.0,
        "withhold_echo": False,
        "protect_facts": False,
        "placement": "system",
        "system": PAPER_SYSTEM,
        "max_tokens": 128,
        "min_tokens": 0,
        "stop": (),
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "repeat_last_n": 64,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "seed": None,
        "template_args": (),
        "date": None,
        "think": None,
        "think_effort": None,
        "think_tokens": None,
        "align_thoughts": False,
        "align_tool_calls": False,
        "schema": None,
        "regex": None,
        "grammar": None,
    }
    assert Settings.paper().prefer == ()


def test_the_papers_prompts() -> None:
    """The reference formats `... advice. {preference}`, in the base with an empty preference."""
    assert PAPER_SYSTEM.strip() + " " == PAPER_SYSTEM
    question = [{"role": "system", "content": PAPER_SYSTEM}, {"role": "user", "content": "Why?"}]
    base = with_preference(question, None, "system")
    assert base == question
    preferred = with_preference(question, PRESETS["creative"], "system")
    assert preferred[0]["content"] == PAPER_SYSTEM + PRESETS["creative"]
    assert preferred[1:] == base[1:]


@pytest.mark.parametrize(
    "values",
    [
        {"logit_bias": {10**5000: 1}},
        {"logit_bias": {-2: 1}},
        {"logit_bias": {True: 1}},
        {"strength": 10**5000},
        {"placement": [[]]},
        {"prefer": [("Be bold.", True)]},
        {"prefer": [("Be bold.", 10**5000)]},
        {"stop": [10**5000]},
    ],
    ids=range(8),
)
def test_monstrous_values_are_refused_in_a_line(values: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as error:
        Settings(**values)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
