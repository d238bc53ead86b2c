from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from amulet_gguf.errors import SettingError
from amulet_gguf.method.mixture import Realignment, coefficients, realign
from amulet_gguf.preferences import MAX_PREFERENCES, MAX_WEIGHT, PRESETS, Preference, as_preferences

EIGHT = ["complex", "concise", "creative", "formal", "pleasant", "sycophantic", "uplifting", "verbose"]
NOT_A_WEIGHT = [math.nan, math.inf, -math.inf, 10.001, -10.001, 1e300, 10**400]

any_weight = st.floats(-MAX_WEIGHT, MAX_WEIGHT)
weights = st.one_of(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0]), any_weight)
several = st.lists(weights, max_size=MAX_PREFERENCES)
strengths = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 5.648699]), st.floats(-100, 1000))
plausibilities = st.floats(0, 1)


# --- presets ---


def test_the_presets_are_the_papers_eight() -> None:
    assert {name: f"Your answer should be {name} as much as possible." for name in EIGHT} == PRESETS
    assert list(PRESETS) == EIGHT  # as help texts list them


@pytest.mark.parametrize("name", EIGHT)
def test_a_presets_name_stands_for_its_text(name: str) -> None:
    for written in (name, name.upper(), name.title(), f"  {name}\n"):
        assert Preference(written).text == PRESETS[name]
        assert Preference.parse(written).text == PRESETS[name]
    assert Preference(PRESETS[name]) == Preference(name)  # the text is a text like any other


@pytest.mark.parametrize("name", EIGHT)
def test_a_misspelt_preset_is_an_error_that_names_it(name: str) -> None:
    for typo in (name[:2] + name[3:], name[:1] + name[2] + name[1] + name[3:], name + "e"):
        for written in (typo, f"{typo}:0.5"):
            with pytest.raises(SettingError, match=f"did you mean '{name}'"):
                Preference.parse(written)


@pytest.mark.parametrize("text", ["concise and formal", "answer in French", "x", "короче"])
def test_other_texts_are_taken_as_they_are(text: str) -> None:
    assert Preference(text) == Preference.parse(text) == Preference(f" {text}\t", 1)
    assert Preference(text).text == text


@pytest.mark.parametrize("word", [*EIGHT, "informal", "unpleasant", "consise"])
def test_the_sentence_that_the_error_message_offers_is_accepted(word: str) -> None:
    assert Preference(f"Be {word}.").text == f"Be {word}."


# --- one preference ---


@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u3000"])
def test_an_empty_preference_is_refused(empty: str) -> None:
    for make in (Preference, Preference.parse, as_preferences):
        with pytest.raises(SettingError, match="empty"):
            make(empty)


@pytest.mark.parametrize("weight", [*NOT_A_WEIGHT, "1", None])
def test_an_impossible_weight_is_refused(weight: Any) -> None:
    with pytest.raises(SettingError, match=r"weight of .* must be a number from -10 to 10"):
        Preference("Be bold.", weight)


@pytest.mark.parametrize("weight", [-10, -0.5, 0, 1e-300, 10])
def test_a_weight_becomes_a_float(weight: float) -> None:
    found = Preference("Be bold.", weight).weight
    assert isinstance(found, float)
    assert found == weight


def test_a_text_has_ten_thousand_characters_at_most() -> None:
    assert Preference("b" * 10_000).text == "b" * 10_000
    with pytest.raises(SettingError, match="10000 characters, got 10001"):
        Preference("b" * 10_001)


def test_a_preference_does_not_change() -> None:
    preference = Preference("concise")
    with pytest.raises(FrozenInstanceError):
        preference.weight = 2.0  # type: ignore[misc]
    assert len({preference, Preference("Concise", 1)}) == 1


# --- text and weight in one ---


@pytest.mark.parametrize(
    ("written", "text", "weight"),
    [
        ("formal:0.5", PRESETS["formal"], 0.5),
        ("Formal:-1", PRESETS["formal"], -1.0),
        ("formal:+.5", PRESETS["formal"], 0.5),
        ("formal:1e-1", PRESETS["formal"], 0.1),
        (" formal:2 ", PRESETS["formal"], 2.0),
        ("Be bold.:10", "Be bold.", 10.0),
        ("Use\ntwo lines:-10", "Use\ntwo lines", -10.0),
        ("tone: warm:2", "tone: warm", 2.0),
        ("a:b:0.5", "a:b", 0.5),
        # No weights, but parts of the text.
        ("in the ratio 2:1", "in the ratio 2:1", 1.0),
        ("ratio 2:1:0.5", "ratio 2:1:0.5", 1.0),
        ("be there at 10:30", "be there at 10:30", 1.0),
        ("tone: warm", "tone: warm", 1.0),
        ("tone:warm", "tone:warm", 1.0),
        ("answer yes:", "answer yes:", 1.0),
        (":2", ":2", 1.0),
    ],
)
def test_weights_as_typed(written: str, text: str, weight: float) -> None:
    assert Preference.parse(written) == Preference(text, weight)
    assert Preference.parse(written).text == text


@given(st.text(), any_weight)
def test_a_weight_written_behind_any_text_is_read_back(text: str, weight: float) -> None:
    text = f"Answer like this: {text}!"
    assert Preference.parse(f"{text}:{weight!r}") == Preference(text, weight)


@given(st.text().filter(lambda text: ":" not in text))
def test_a_text_without_a_colon_is_all_text(text: str) -> None:
    text = f"Answer like this. {text}"
    assert Preference.parse(text) == Preference(text.strip(), 1.0)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "infinity", "1e999", "10.5", "-11"])
def test_a_typed_weight_out_of_range_is_refused(weight: str) -> None:
    for text in ("formal", "Be bold."):
        with pytest.raises(SettingError, match="must be a number from -10 to 10, got"):
            Preference.parse(f"{text}:{weight}")


@pytest.mark.parametrize("weight", ["much", "0,5", "0.5x", "--1", "1/2"])
def test_a_presets_weight_must_be_a_number(weight: str) -> None:
    with pytest.raises(SettingError, match=f"the weight of 'formal' must be a number, got '{weight}'"):
        Preference.parse(f"formal:{weight}")


# --- several preferences ---


def test_accepted_forms() -> None:
    bold, kind = Preference("Be bold."), Preference("Be kind.", 2.0)
    assert as_preferences(None) == as_preferences([]) == as_preferences(()) == ()
    for one in (
        "Be bold.",
        ("Be bold.", 1),
        bold,
        ["Be bold."],
        [("Be bold.", 1.0)],
        (bold,),
        {"Be bold."},
    ):
        assert as_preferences(one) == (bold,)
    two: Any
    for two in (
        ["Be bold.", "Be kind.:2"],
        ("Be bold.", "Be kind.:2"),
        [bold, ("Be kind.", 2)],
        (("Be bold.", 1), kind),
        (item for item in (bold, kind)),
    ):
        assert as_preferences(two) == (bold, kind)
    assert as_preferences((bold, kind))[1] is kind
    assert as_preferences([bold, bold]) == (bold, bold)


def test_pairs_are_read_as_json_writes_them() -> None:
    expected = (Preference("Be bold.", -0.5), Preference("concise"))
    written: Any = [["Be bold.", -0.5], {"text": "concise"}]
    assert as_preferences(written) == expected
    assert (
        as_preferences(json.loads(json.dumps([dataclasses.asdict(each) for each in expected])))
        == expected
    )


@pytest.mark.parametrize(
    "bad",
    [
        *(5, 0.5, True, b"bold", object(), "", ("", 1), ("bold",) * 9, ("bold", None)),
        *(
            [None],
            [["bold", 1, 2]],
            [("bold", 1, 2)],
            [{"text": "bold", "wait": 1}],
            [{"weight": 1}],
            ["bold", 0.5],
            [("bold",)],
            [(1, "bold")],
            [""],
        ),
        *({1: "bold"}, [("bold", math.nan)]),
    ],
)
def test_anything_else_is_refused(bad: Any) -> None:
    with pytest.raises(SettingError):
        as_preferences(bad)


def test_at_most_eight_preferences() -> None:
    assert len(as_preferences(["Be bold."] * MAX_PREFERENCES)) == MAX_PREFERENCES == 8
    with pytest.raises(SettingError, match="at most 8 preferences, got 9"):
        as_preferences(["Be bold."] * 9)


# --- coefficients and plans ---


def total(amounts: Sequence[float]) -> float:
    """How far the sum is from 1, in units of what float64 rounds."""
    return abs(math.fsum(amounts) - 1) / (2.0**-52 * max(1.0, sum(map(abs, amounts))))


def whole(plan: Realignment, amounts: tuple[float, ...], n: int) -> list[float]:
    """Amounts of the plan's branches as amounts of the base and all n preferences."""
    spread = np.zeros(n + 1)
    spread[list(plan.branches)] = amounts
    return spread.tolist()


@given(several, strengths)
def test_coefficients_sum_to_one_and_scale_with_the_strength(ws: list[float], s: float) -> None:
    base, *others = coefficients(ws, s)
    assert others == [s * weight for weight in ws]
    assert total([base, *others]) <= 8


def test_coefficients_by_hand() -> None:
    assert coefficients([], 5.65) == (1.0,)
    assert coefficients([1], 0.0) == (1.0, 0.0)
    assert coefficients([1], 1.0) == (0.0, 1.0)
    assert coefficients([1], 3.0) == (-2.0, 3.0)
    assert coefficients([1, -0.5], 2.0) == (0.0, 2.0, -1.0)
    assert coefficients([0.5, 0.25], 2.0) == (-0.5, 1.0, 0.5)


@given(several, strengths, plausibilities)
@example([1.0, 1.0], 1.0, 0.1)
@example([-1.0], 0.5, 0.1)
@example([0.0, 3.0], 2.0, 0.1)
@example([2.0], 0.5, 0.1)
def test_a_plan_is_the_affine_combination_it_stands_for(ws: list[float], s: float, a: float) -> None:
    plan = realign(ws, s, a)
    assert plan.branches == tuple(sorted(set(plan.branches)))
    assert len(plan.branches) == len(plan.coefficients) == len(plan.reference) >= 1
    assert total(plan.coefficients) <= 8
    assert total(plan.reference) <= 8
    amounts = coefficients(ws, s)
    assert whole(plan, plan.coefficients, len(ws)) == list(amounts)
    if all(0 <= amount <= 1 for amount in amounts):
        # A mean promotes nothing that all its branches find improbable.
        assert plan.plausibility == 0
        assert 0 not in plan.coefficients
    else:
        assert plan.plausibility == a
        assert plan.branches == tuple(range(len(ws) + 1))
        assert plan.reference == coefficients(ws, 1.0)


@given(several, strengths, plausibilities)
def test_the_reference_is_ordinary_prompting_wherever_its_branches_are_decoded(
    ws: list[float], s: float, a: float
) -> None:
    plan = realign(ws, s, a)
    prompted = coefficients(ws, 1.0)
    needed = {branch for branch, amount in enumerate(prompted) if amount != 0}
    if needed <= set(plan.branches):
        assert whole(plan, plan.reference, len(ws)) == list(prompted)
    else:
        assert plan.reference == plan.coefficients


@given(several, plausibilities)
def test_strength_zero_is_the_base_alone(ws: list[float], a: float) -> None:
    assert realign(ws, 0.0, a) == Realignment((0,), (1.0,), (1.0,), 0.0)


@given(strengths, plausibilities)
def test_without_preferences_there_is_only_the_base(s: float, a: float) -> None:
    assert realign([], s, a) == Realignment((0,), (1.0,), (1.0,), 0.0)


@given(st.integers(0, 7), st.integers(0, 7), plausibilities)
def test_one_preference_at_strength_one_is_itself_alone(before: int, after: int, a: float) -> None:
    assume(before + after < MAX_PREFERENCES)
    ws = [0.0] * before + [1.0] + [0.0] * after
    assert realign(ws, 1.0, a) == Realignment((before + 1,), (1.0,), (1.0,), 0.0)


def test_shares_of_ordinary_prompting_need_no_base() -> None:
    plan = realign([0.5, 0.25, 0.25], 1.0, 0.1)
    assert plan == Realignment((1, 2, 3), (0.5, 0.25, 0.25), (0.5, 0.25, 0.25), 0.0)
    # Halfway to ordinary prompting: the base is needed, and judges nothing.
    assert realign([1], 0.5, 0.1) == Realignment((0, 1), (0.5, 0.5), (0.0, 1.0), 0.0)


@pytest.mark.parametrize("ws", [[0.9, 1.6], [1.6, 0.9], [0.1, 0.8, 1.6]])
def test_shares_that_sum_to_one_but_for_rounding_need_no_base(ws: list[float]) -> None:
    assert math.fsum(ws) == 1 / 0.4
    plan = realign(ws, 0.4, 0.1)
    assert plan.branches == tuple(range(1, len(ws) + 1))
    assert plan.plausibility == 0
