"""A strength that fades, worked out by hand and by an independent sum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.llama.model import Model
from amulet_gguf.method.mixture import Fade, Mixture, coefficients
from amulet_gguf.methods import AUTO, auto_for, describe_auto, resolve
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

LOGITS = np.random.default_rng(0).normal(0, 3, (3, 64)).astype(np.float32)


def combined(mixture: Mixture, n: int, logits: np.ndarray = LOGITS) -> list[np.ndarray]:
    rows = [np.empty(logits.shape[1], np.float32) for _ in range(n)]
    for row in rows:
        mixture.combine(np.ascontiguousarray(logits[list(mixture.needed)]), row)
    return rows


@given(st.floats(-5, 20), st.floats(0, 5), st.floats(0, 200), st.integers(0, 500))
def test_a_fade_is_what_its_formula_says(strength: float, floor: float, tokens: float, t: int) -> None:
    fade = Fade(strength, floor, tokens)
    if tokens == 0 or strength <= floor:
        assert fade.at(t) == fade.at(0) == strength
    else:
        left = (strength - floor) * math.exp(-t / tokens)
        assert fade.at(t) == pytest.approx(floor + (left if left > Fade.NEGLIGIBLE else 0.0))
        assert floor <= fade.at(t + 1) <= fade.at(t) <= strength


def test_each_token_is_combined_with_its_own_strength() -> None:
    """Two preferences, weights 1 and -0.5: every token against a combination made for its strength."""
    weights, fade = [1.0, -0.5], Fade(6.65, 2.0, 48.0)
    mixture = Mixture(
        coefficients(weights, fade.strength),
        coefficients(weights, 1.0),
        fade=fade,
        at=lambda s: coefficients(weights, s),
    )
    for t, row in enumerate(combined(mixture, 200)):
        s = 2 + 4.65 * math.exp(-t / 48)
        base, first, second = LOGITS.astype(np.float64)
        expected = base + s * (first - base) - 0.5 * s * (second - base)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-4)
    assert mixture.strength == pytest.approx(2 + 4.65 * math.exp(-199 / 48))


def test_another_mixture_begins_its_fade_anew(tiny_model: Model) -> None:
    planner = Planner(tiny_model)
    settings = Settings(prefer="concise", strength=6, fade=10, fade_to=1, withhold_echo=False)
    first, second = planner.mixture(settings), planner.mixture(settings)
    logits = LOGITS[:2]
    combined(first, 30, logits)
    combined(second, 1, logits)
    assert second.strength == 6
    assert first.strength == pytest.approx(1 + 5 * math.exp(-2.9))


@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_a_strength_below_the_floor_is_constant(tiny_model: Model, strength: float) -> None:
    planner = Planner(tiny_model)
    settings = Settings(prefer="concise", strength=strength, withhold_echo=False)
    faded = planner.mixture(settings.replace(fade=5, fade_to=2))
    constant = planner.mixture(settings.replace(fade="none"))
    for one, other in zip(
        combined(faded, 9, LOGITS[:2]), combined(constant, 9, LOGITS[:2]), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_fading_strength_keeps_all_branches(tiny_model: Model) -> None:
    """Between 0 and 1 no branch has to be there at all strengths; while it fades, all are needed."""
    planner = Planner(tiny_model)
    for settings, n in (
        (Settings(prefer="concise", strength=1, fade=0), 1),
        (Settings(prefer="concise", strength=1, fade=8, fade_to=0.5), 2),
        (Settings(prefer="concise", strength=0, fade=8, fade_to=0), 1),
    ):
        assert len(planner.request("Why?", None, settings).branches) == n


# --- what is to be avoided ---


@given(st.lists(st.floats(-2, 2), max_size=4), st.floats(-10, 50))
def test_a_contrast_leads_away_from_itself_beyond_prompting(weights: list[float], s: float) -> None:
    rows = np.random.default_rng(len(weights)).normal(0, 3, (len(weights) + 2, 8))
    base, *preferences, contrast = rows
    found = np.array(coefficients(weights, s, True)) @ rows
    prompted = base + sum(w * (row - base) for w, row in zip(weights, preferences, strict=True))
    expected = prompted + (s - 1) * (prompted - contrast) if s > 1 else base + s * (prompted - base)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert sum(coefficients(weights, s, True)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "n_branches"),
    [
        ({"strength": 3, "fade": 0}, 2),  # the preference and the contrast: the base is not needed
        ({"strength": 6, "fade": 9, "fade_to": 2}, 2),
        ({"strength": 6, "fade": 9, "fade_to": 0.5}, 3),  # below 1 it is
        ({"strength": 1, "fade": 0}, 1),
        ({"strength": 0, "fade": 0}, 1),
        ({"strength": 0.5, "fade": 0}, 2),  # the base and the preference
        ({"strength": 3, "fade": 0, "prefer": ["concise:0.5"]}, 3),
    ],
)
def test_only_branches_that_are_needed_are_there(
    tiny_model: Model, options: dict[str, Any], n_branches: int
) -> None:
    settings = Settings(**{"prefer": "concise", "avoid": "verbose", "withhold_echo": False, **options})
    planner = Planner(tiny_model)
    request = planner.request("Why?", None, settings)
    assert len(request.branches) == n_branches
    # The mixture of an adjustable generation, which has all branches, makes the same of them.
    everything = planner.request("Why?", None, settings, is_adjustable=True)
    assert len(everything.branches) == settings.n_branches == 3
    where = [
        next(i for i, all_of in enumerate(everything.branches) if np.array_equal(all_of, branch))
        for branch in request.branches
    ]
    few = combined(request.mixture, 30, np.ascontiguousarray(LOGITS[where]))
    many = combined(everything.mixture, 30, LOGITS)
    for one, other in zip(few, many, strict=True):
        kept = np.isfinite(one) & np.isfinite(other)
        if request.mixture.margin == everything.mixture.margin:  # a mean needs no mask
            np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other))
        np.testing.assert_allclose(one[kept], other[kept], rtol=1e-5, atol=1e-4)


def test_avoid_alone_is_a_negative_preference(tiny_model: Model) -> None:
    planner = Planner(tiny_model)
    options = {"strength": 2.0, "fade": "none"}
    alone = planner.request("Why?", None, Settings(avoid="verbose", **options))  # type: ignore[arg-type]
    negative = planner.request("Why?", None, Settings(prefer="verbose:-1", **options))  # type: ignore[arg-type]
    assert [each.tolist() for each in alone.branches] == [each.tolist() for each in negative.branches]
    assert alone.mixture.coefficients.tolist() == negative.mixture.coefficients.tolist() == [3.0, -2.0]


# --- what is left to the model ---


def test_auto_follows_the_size_of_the_model() -> None:
    for n_parameters, auto in ((1.35e8, AUTO[0]), (4.9e8, AUTO[1]), (7e10, AUTO[1])):
        assert auto_for(int(n_parameters)) is auto
        settings = resolve(Settings(), int(n_parameters))
        assert (settings.strength, settings.fade, settings.fade_to) == (
            auto.strength, auto.fade, auto.fade_to,
        )  # fmt: skip
        assert describe_auto(int(n_parameters)).startswith(f"{auto.strength:g}")


def test_what_is_typed_stays() -> None:
    settings = resolve(Settings(strength=3, fade="none"), 10**9)
    assert (settings.strength, settings.fade) == (3, 0)
    assert resolve(Settings.paper(), 10**8).strength == Settings.paper().strength
    assert Settings(strength="auto", fade="auto", fade_to="auto") == Settings()
