from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from literal import exact_strength, ftrl, log_softmax

from amulet_gguf.errors import NonFiniteLogitsError, SettingError
from amulet_gguf.method.mixture import coefficients
from amulet_gguf.method.realign import argmax, combine, combine_unchecked, log_plausibility, strength

Row = npt.NDArray[np.float32]

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "amulet_game.npz"
PAPER = 5.648699  # the strength of the paper's defaults
SIZES = (2, 3, 1023, 1024, 1025, 4096, 49152, 151936)
LARGEST = float(np.finfo(np.float32).max)
HUGE = (10**400, -(10**400))  # whole numbers that no float can hold
TINIEST = float(np.finfo(np.float32).smallest_subnormal)

seeds = st.integers(0, 2**32 - 1)
finite = st.floats(-1e4, 1e4, width=32)


def rows(n: int, size: int, seed: int, scale: float = 6.0) -> Row:
    """Rows that agree for the most part, as branches of one conversation do."""
    random = np.random.default_rng(seed)
    shared = random.normal(0, scale, size)
    return (shared + random.normal(0, scale / 4, (n, size))).astype(np.float32)


def affine(n: int, seed: int, scale: float = 3.0) -> npt.NDArray[np.float64]:
    weights = np.random.default_rng(seed).normal(0, scale, n)
    weights[0] = 1 - weights[1:].sum()
    return weights


def tolerance(result: npt.ArrayLike) -> float:
    """What float32 allows: 1e-5 where all |logit| < 84, two roundings of the largest one beyond that.

    A log-probability is off by the rounding of its own logit and by that of the normalizer, which is
    at most the largest logit's.
    """
    kept = np.asarray(result, np.float64)
    return max(1e-5, float(np.abs(kept[np.isfinite(kept)]).max()) * 2.0**-23)


def assert_same_distribution(result: Row, expected: npt.NDArray[np.float64]) -> None:
    assert result.dtype == np.float32
    np.testing.assert_allclose(log_softmax(result), expected, rtol=0, atol=tolerance(result))


# --- strength ---


def test_defaults_give_the_papers_strength() -> None:
    assert round(strength(), 6) == PAPER


@pytest.mark.parametrize(
    ("arguments", "g", "digits"),
    [
        ({"iterations": 10}, 2.90, 2),
        ({"iterations": 20}, 3.57, 2),
        ({"iterations": 60}, 4.648699, 6),
        ({"iterations": 100}, 5.16, 2),
        ({"eta": 1.0}, 4.44, 2),
        ({"eta": 100.0}, 4.68, 2),
        ({"alpha": 4.0}, 117, 0),
    ],
)
def test_known_figures(arguments: dict[str, float], g: float, digits: int) -> None:
    assert round(strength(**arguments) - 1, digits) == g  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "lam"), [(1.0, 2.0), (0.1, 1.0), (1.8, 2.0), (0.0, 3.0)])
def test_alpha_below_lambda_converges(alpha: float, lam: float) -> None:
    ratio = alpha / lam
    limit = ratio / (1 - ratio)
    errors = [abs(strength(alpha, lam, 10.0, n) - 1 - limit) for n in (100, 1_000, 10_000, 100_000)]
    # The error falls like T^(ratio - 1).
    for before, after in itertools.pairwise(errors):
        assert after <= before * 10 ** (ratio - 1) * 1.2 + 1e-12


def test_alpha_equal_to_lambda_grows_like_the_logarithm_of_iterations() -> None:
    steps = [strength(iterations=2 * n) - strength(iterations=n) for n in (100, 1_000, 10_000, 50_000)]
    assert steps == pytest.approx([math.log(2)] * 4, abs=0.01)


@given(st.floats(0, 100), st.floats(0.01, 100), st.floats(0.01, 1000))
def test_no_iterations_is_ordinary_prompting(alpha: float, lam: float, eta: float) -> None:
    assert strength(alpha, lam, eta, 0) == 1.0


@given(st.floats(0, 100), st.floats(0.01, 100), st.floats(0.01, 1000))
def test_one_iteration_in_closed_form(alpha: float, lam: float, eta: float) -> None:
    assert strength(alpha, lam, eta, 1) == pytest.approx(1 + alpha / (lam + 1 / eta), rel=1e-12)


@given(
    st.fractions(0, 8, max_denominator=50),
    st.fractions(Fraction(1, 10), 8, max_denominator=50),
    st.fractions(Fraction(1, 10), 100, max_denominator=50),
    st.integers(0, 16),
)
@settings(deadline=None)
def test_strength_is_the_recurrence_in_exact_arithmetic(
    alpha: Fraction, lam: Fraction, eta: Fraction, iterations: int
) -> None:
    expected = float(exact_strength(alpha, lam, eta, iterations))
    assert strength(float(alpha), float(lam), float(eta), iterations) == pytest.approx(
        expected, rel=1e-12
    )


@given(
    st.floats(0, 4),
    st.floats(0.5, 4),
    st.floats(0.05, 100),
    st.integers(0, 100),
    st.floats(0.01, 3),
    seeds,
)
@settings(deadline=None, max_examples=60)
def test_strength_replaces_the_literal_game(
    alpha: float, lam: float, eta: float, iterations: int, scale: float, seed: int
) -> None:
    base, pref = rows(2, 7, seed, scale).astype(np.float64)
    s = strength(alpha, lam, eta, iterations)
    played = ftrl(base, pref, alpha, lam, eta, iterations)
    at_once = log_softmax(base + s * (pref - base))
    np.testing.assert_allclose(at_once, played, rtol=1e-10, atol=1e-10 * (1 + abs(s) * scale))


@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, -math.inf, -1.0, -TINIEST, *(pytest.param(h, id="huge") for h in HUGE)],
)
@pytest.mark.parametrize("name", ["alpha", "lam", "eta"])
def test_impossible_parameters_are_refused_by_name(name: str, bad: float) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be"):
        strength(**{name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lam", "eta"])
def test_zero_is_refused_where_it_would_divide(name: str) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be a finite number > 0"):
        strength(**{name: 0.0})  # type: ignore[arg-type]
    assert strength(alpha=0.0) == 1.0


@pytest.mark.parametrize("bad", [-1, 100_001, 10**30, math.nan, math.inf])
def test_impossible_iterations_are_refused(bad: int) -> None:
    with pytest.raises(SettingError, match=r"^iterations must be from 0 to 100000"):
        strength(iterations=bad)


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 1e4, "lam": 1.0, "iterations": 100_000},
        {"alpha": 1e300, "lam": 1e-300},
        {"alpha": 1e308, "lam": 1e-3, "iterations": 3},
    ],
)
def test_overflow_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="infinite"):
        strength(**arguments)  # type: ignore[arg-type]


# --- combine: the method ---


def test_golden_cases_of_the_reference_implementation() -> None:
    with np.load(GOLDEN) as golden:
        cases = int(golden["count"])
        assert cases == 12
        for i in range(cases):
            alpha, lam, eta, iterations = golden[f"params_{i}"].tolist()
            s = strength(alpha, lam, eta, int(iterations))
            result = combine(np.stack([golden[f"base_{i}"], golden[f"pref_{i}"]]), (1 - s, s))
            expected = golden[f"logprobs_{i}"]
            np.testing.assert_allclose(log_softmax(result), expected, rtol=0, atol=1e-5)
            played = ftrl(golden[f"base_{i}"], golden[f"pref_{i}"], alpha, lam, eta, int(iterations))
            np.testing.assert_allclose(played, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_combine_is_the_literal_game(size: int) -> None:
    both = rows(2, size, seed=size)
    assert_same_distribution(combine(both, (1 - strength(), strength())), ftrl(*both))


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=12), st.integers(0, 80))
@example([(0.0, 0.0)] * 5, 60)  # all equal
@example([(1.0, 2.0), (1.0, 2.0), (0.5, 2.0)], 60)  # ties
@example([(1e4, -1e4), (-1e4, 1e4)], 60)  # the largest spread
@settings(deadline=None)
def test_combine_is_the_literal_game_on_edge_vectors(
    columns: list[tuple[float, float]], iterations: int
) -> None:
    both = np.array(columns, np.float32).T.copy()
    s = strength(iterations=iterations)
    assert_same_distribution(combine(both, (1 - s, s)), ftrl(both[0], both[1], iterations=iterations))


@given(st.integers(1, 5), st.sampled_from(SIZES), st.floats(0.01, 1000), seeds)
@settings(deadline=None, max_examples=40)
def test_combine_is_the_float64_sum_rounded_once(n: int, size: int, scale: float, seed: int) -> None:
    logits = rows(n, size, seed, scale)
    weights = affine(n, seed)
    result = combine(logits, weights)
    exact = weights @ logits.astype(np.float64)
    summed = np.abs(weights) @ np.abs(logits.astype(np.float64))
    rounding = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
    assert (np.abs(result - exact) <= rounding * (1 + 1e-6) + summed * n * 2.0**-52).all()


@given(st.integers(1, 4), st.sampled_from([1, 3, 1024, 1025]), seeds)
@settings(deadline=None)
def test_a_lone_coefficient_of_one_gives_its_row(n: int, size: int, seed: int) -> None:
    logits = rows(n, size, seed)
    for k in range(n):
        assert combine(logits, np.eye(n)[k]).tobytes() == logits[k].tobytes()


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(-100, 1000),
)
@example([TINIEST, -TINIEST, 0.0], PAPER)
@settings(deadline=None)
def test_a_preference_that_changes_nothing_gives_the_base(base: list[float], s: float) -> None:
    row = np.array(base, np.float32)
    np.testing.assert_array_equal(combine(np.stack([row, row]), coefficients([1.0], s)), row)


@given(st.integers(2, 5), st.floats(0, 8), st.floats(-50, 50), seeds)
@settings(deadline=None)
def test_constants_added_to_rows_do_not_matter(n: int, s: float, shift: float, seed: int) -> None:
    """Why no log-softmax is needed: coefficients that sum to 1 turn constants into one constant."""
    logits = rows(n, 50, seed)
    weights = coefficients([1 / (n - 1)] * (n - 1), s)
    shifted = logits + (np.arange(n) * shift)[:, None].astype(np.float32)
    before = log_softmax(combine(logits, weights))
    after = log_softmax(combine(shifted, weights))
    # The shifted rows are rounded to float32, and the coefficients magnify that.
    magnified = float(np.abs(weights).sum()) * float(np.abs(shifted).max()) * 2.0**-23
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 + magnified)


# --- combine: plausibility ---


def assert_mask(result: Row, judged: npt.NDArray[np.float64], plausibility: float, size: float) -> None:
    """Compare the mask with p >= a max p, where float32 (of logits up to `size`) can tell."""
    log_p = log_softmax(judged)
    kept = np.isfinite(result)
    distance = log_p - log_p.max() - math.log(plausibility)
    borderline = np.abs(distance) <= size * 2.0**-22
    np.testing.assert_array_equal(kept[~borderline], (distance >= 0)[~borderline])
    assert kept[np.argmax(judged)]
    assert (result[~kept] == -np.inf).all()


@given(
    st.integers(1, 5),
    st.sampled_from(SIZES[:6]),
    st.one_of(st.floats(1e-300, 1), st.sampled_from([0.1, 0.5, 1.0, TINIEST])),
    st.floats(-5, 8),
    seeds,
)
@settings(deadline=None)
def test_the_mask_is_taken_from_ordinary_prompting(
    n: int, size: int, plausibility: float, s: float, seed: int
) -> None:
    logits = rows(n, size, seed)
    weights = np.random.default_rng(seed).uniform(-2, 2, n - 1).tolist()  # negative ones too
    amounts = coefficients(weights, s)
    reference = coefficients(weights, 1.0)
    result = combine(logits, amounts, plausibility, reference)
    size_of_logits = float(np.abs(reference).sum()) * float(np.abs(logits).max())
    assert_mask(result, reference @ logits.astype(np.float64), plausibility, size_of_logits)
    kept = np.isfinite(result)
    np.testing.assert_array_equal(result[kept], combine(logits, amounts)[kept])


def test_the_mask_by_hand() -> None:
    """A token improbable in both contexts wins the extrapolation unless it is masked before."""
    base = np.log(np.array([0.6, 0.3, 0.1, 1e-9], np.float32))
    pref = np.log(np.array([0.5, 0.4, 0.1, 1e-5], np.float32))
    both = np.stack([base, pref])
    s = (1 - PAPER, PAPER)
    assert np.argmax(combine(both, s)) == 3
    guarded = combine(both, s, 0.1)
    assert np.isfinite(guarded).tolist() == [True, True, True, False]
    assert np.argmax(guarded) == 1
    assert np.isfinite(combine(both, s, 0.3)).tolist() == [True, True, False, False]
    assert np.isfinite(combine(both, s, 0.3, reference=(1.0, 0.0))).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert np.isfinite(combine(both, s, 0.7)).tolist() == [True, True, False, False]
    assert np.isfinite(combine(both, s, 0.7, reference=(1.0, 0.0))).tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_a_negative_weight_counts_against_its_tokens() -> None:
    base = np.zeros(3, np.float32)
    wanted = np.array([3, 3, 0], np.float32)
    unwanted = np.array([3, 0, 0], np.float32)
    logits = np.stack([base, wanted, unwanted])
    result = combine(logits, coefficients([1, -1], 4.0), 0.9, coefficients([1, -1], 1.0))
    assert np.isfinite(result).tolist() == [False, True, False]


@given(st.integers(1, 5), st.sampled_from([1, 2, 1023, 1024, 1025, 4096]), seeds)
@settings(deadline=None)
def test_plausibility_zero_masks_nothing_and_one_keeps_the_best(n: int, size: int, seed: int) -> None:
    logits = rows(n, size, seed)
    weights = affine(n, seed)
    reference = np.eye(n)[seed % n]
    assert np.isfinite(combine(logits, weights, 0.0, reference)).all()
    best = logits[seed % n] == logits[seed % n].max()
    np.testing.assert_array_equal(np.isfinite(combine(logits, weights, 1.0, reference)), best)


def test_equals_of_the_best_are_all_kept() -> None:
    pref = np.array([1, 5, 5, 2, 5], np.float32)
    result = combine(np.stack([np.zeros(5, np.float32), pref]), (-1, 2), 1.0)
    assert np.isfinite(result).tolist() == [False, True, True, False, True]


def test_without_a_reference_the_preference_row_judges() -> None:
    both = rows(2, 300, 1)
    weights = (-2.0, 3.0)
    np.testing.assert_array_equal(combine(both, weights, 0.2), combine(both, weights, 0.2, (0.0, 1.0)))
    only = both[:1].copy()
    np.testing.assert_array_equal(combine(only, (1.0,), 0.2), combine(only, (1.0,), 0.2, (1.0,)))
    three = rows(3, 300, 1)
    with pytest.raises(SettingError, match="reference is needed to mask a combination of 3 rows"):
        combine(three, (-1, 1, 1), 0.2)
    assert np.isfinite(combine(three, (-1, 1, 1))).all()


# --- combine: memory ---


@pytest.mark.parametrize("n", [1, 2, 3])
def test_out_is_filled_and_returned(n: int) -> None:
    logits = rows(n, 2000, n)
    weights = affine(n, n)
    out = np.full(2000, np.nan, np.float32)
    assert combine(logits, weights, 0.1, weights, out) is out
    np.testing.assert_array_equal(out, combine(logits, weights, 0.1, weights))
    # A second use finds nothing of the first.
    assert combine(-logits, weights, 0.0, weights, out) is out
    np.testing.assert_array_equal(out, combine(-logits, weights))


def test_logits_are_only_read() -> None:
    logits = rows(3, 3000, 5)
    before = logits.copy()
    logits.flags.writeable = False  # as views of another's memory may be
    combine(logits, (-1, 1, 1), 0.1, (-1, 1, 1))
    np.testing.assert_array_equal(logits, before)


def test_out_may_lie_beside_the_logits() -> None:
    memory = rows(4, 100, 2)
    expected = combine(memory[:2].copy(), (-1, 2), 0.1)
    np.testing.assert_array_equal(combine(memory[:2], (-1, 2), 0.1, out=memory[2]), expected)


# --- combine: errors ---

GOOD = rows(2, 8, 0)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (GOOD.astype(np.float64), "expected a float32 array of shape .B, V., got float64"),
        (GOOD.astype(">f4"), "expected a float32 array"),
        (GOOD[0], r"got float32 \(8,\)"),
        (GOOD[None], r"got float32 \(1, 2, 8\)"),
        (GOOD.tolist(), "got list"),
        (None, "got NoneType"),
        (np.empty((0, 8), np.float32), "at least one row and column"),
        (np.empty((2, 0), np.float32), "at least one row and column"),
        (GOOD.T, "C-contiguous"),
        (GOOD[:, ::2], "C-contiguous"),
        (GOOD[::-1], "C-contiguous"),
    ],
)
def test_unusable_logits_are_refused(logits: Row, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        combine(logits, (-1, 2))


@pytest.mark.parametrize("name", ["coefficients", "reference"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0,), r"expected shape \(2,\), got \(1,\)"),
        ((0.5, 0.25, 0.25), r"expected shape \(2,\), got \(3,\)"),
        (((0.0, 1.0),), r"expected shape \(2,\), got \(1, 2\)"),
        ((), "expected shape"),
        ((0.0, 0.0), "sum to 1"),
        ((1.0, 1.0), "sum to 1"),
        ((0.0, 1.0001), "sum to 1"),
        ((-1000.0, 1001.01), "sum to 1"),
        ((math.nan, 1.0), "finite"),
        ((math.inf, -math.inf), "finite"),
        ((math.inf, 1.0), "finite"),
        (("base", "preference"), ""),
        (((1.0,), (0.5, 0.5)), ""),
    ],
)
def test_coefficients_that_are_not_affine_are_refused(
    name: str, values: tuple[float], message: str
) -> None:
    arguments: dict[str, Any] = {"coefficients": (-1, 2), "reference": (0, 1), name: values}
    with pytest.raises(SettingError, match=f"^{name}.*{message}"):
        combine(GOOD, **arguments)


@pytest.mark.parametrize("plausibility", [-TINIEST, 1.0000001, math.nan, math.inf, -math.inf])
def test_impossible_plausibility_is_refused(plausibility: float) -> None:
    with pytest.raises(SettingError, match="plausibility must be from 0 to 1"):
        combine(GOOD, (-1, 2), plausibility)


def read_only() -> Row:
    out = np.empty(8, np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty(7, np.float32), r"expected a float32 array of shape \(8,\)"),
        (np.empty((1, 8), np.float32), r"expected a float32 array of shape \(8,\)"),
        (np.empty(8, np.float64), r"expected a float32 array of shape \(8,\)"),
        ([0.0] * 8, r"expected a float32 array of shape \(8,\)"),
        (np.empty(16, np.float32)[::2], "contiguous"),
        (read_only(), "writeable"),
        (GOOD[0], "overlap"),
        (GOOD.reshape(-1)[4:12], "overlap"),
    ],
)
def test_unusable_out_is_refused_and_left_alone(out: Row, message: str) -> None:
    before = GOOD.copy()
    with pytest.raises(SettingError, match=message):
        combine(GOOD, (-1, 2), out=out)
    np.testing.assert_array_equal(GOOD, before)


@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 1023, 1024, 1025, 4096]),
    st.sampled_from([math.nan, -math.nan, math.inf, -math.inf]),
    st.data(),
)
@settings(deadline=None)
def test_one_bad_logit_anywhere_is_an_error(n: int, size: int, bad: float, data: st.DataObject) -> None:
    logits = rows(n, size, n)
    row = data.draw(st.integers(0, n - 1))
    logits[row, data.draw(st.integers(0, size - 1))] = bad
    used = np.eye(n)[data.draw(st.integers(0, n - 1))]  # often not the bad row
    for plausibility in (0.0, 0.1):
        with pytest.raises(NonFiniteLogitsError):
            combine(logits, used, plausibility, used)


@pytest.mark.parametrize("column", [0, 1, 75_000, 151_935])
def test_one_bad_logit_is_found_in_a_large_vocabulary(column: int) -> None:
    logits = rows(2, 151_936, 1)
    logits[0, column] = np.nan
    with pytest.raises(NonFiniteLogitsError):
        combine(logits, (0.0, 1.0))


def test_a_result_beyond_float32_is_an_error_not_infinity() -> None:
    logits = np.array([[-LARGEST, 0], [LARGEST, 0]], np.float32)
    with pytest.raises(NonFiniteLogitsError):
        combine(logits, (-1.0, 2.0))
    np.testing.assert_array_equal(combine(logits, (0.0, 1.0)), logits[1])


# --- combine_unchecked and argmax ---


@given(st.integers(1, 5), st.sampled_from([1, 2, 7, 1023, 1024, 1025, 3000]), st.floats(0, 1), seeds)
@settings(deadline=None)
def test_the_prompted_token_is_the_references_argmax(
    n: int, size: int, plausibility: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    # Small whole logits and weights: many ties, and no rounding anywhere.
    logits = random.integers(-4, 5, (n, size)).astype(np.float32)
    reference = random.integers(-3, 4, n).astype(np.float64)
    reference[0] = 1 - reference[1:].sum()
    out = np.empty(size, np.float32)
    token = combine_unchecked(logits, affine(n, seed), log_plausibility(plausibility), reference, out)
    assert token == np.argmax(reference @ logits)
    assert np.isfinite(out[token])


edge_values = st.sampled_from(
    [0.0, 1.0, -1.0, TINIEST, -TINIEST, 1e-40, -1e-40, LARGEST, -LARGEST, -math.inf, math.inf]
)


@given(
    st.sampled_from([1, 2, 1023, 1024, 1025, 2048, 2049, 5000]),
    edge_values,
    st.lists(st.tuples(st.integers(0, 4999), edge_values), max_size=8),
)
@settings(deadline=None, max_examples=300)
def test_argmax_is_numpys_with_ties_across_blocks(
    size: int, rest: float, placed: list[tuple[int, float]]
) -> None:
    values = np.full(size, rest, np.float32)
    for at, value in placed:
        values[at % size] = value
    assert argmax(values) == np.argmax(values)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
@settings(deadline=None)
def test_argmax_is_numpys_on_any_floats(values: list[float]) -> None:
    row = np.array(values, np.float32)
    assert argmax(row) == np.argmax(row)


def test_argmax_prefers_a_block_with_positive_zero() -> None:
    values = np.full(2048, -0.0, np.float32)
    assert argmax(values) == 0
    values[1500] = 0.0
    assert argmax(values) == 1024  # that block's first largest
    values[:1024] = 0.0
    assert argmax(values) == 0


# --- the cache of compiled kernels ---

CHILD = """
import json
import numpy as np
import amulet_gguf.method.realign as realign
logits = np.array([[0, 1, 2], [1, 1, 0]], np.float32)
print(json.dumps([realign.__file__, KERNEL]))
"""
COMBINED = "realign.combine(logits, (-1, 2), 0.1).tolist()"
ARGMAX = "int(realign.argmax(logits[0]))"  # compiles in a fraction of the time


def run_copy(package: Path, kernel: str, environment: dict[str, str], before: str = "") -> None:
    """Run a kernel in a new process that imports the package's copy in `package`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", before + CHILD.replace("KERNEL", kernel)],
        env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        cwd=package,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    home, result = json.loads(done.stdout)
    assert Path(home).is_relative_to(package)
    assert result == (2 if kernel == ARGMAX else [2.0, 1.0, -2.0])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds a copy of the package, compiled files left out."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "amulet_gguf", tmp_path / "site" / "amulet_gguf", ignore=ignore)
    return tmp_path / "site"


def nowhere(package: Path) -> dict[str, str]:
    """Put a file wherever a cache folder could be made: that stops even a superuser."""
    blocked = package / "blocked"
    blocked.touch()
    (package / "amulet_gguf" / "method" / "__pycache__").touch()
    names = ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "APPDATA", "NUMBA_CACHE_DIR", "IPYTHONDIR")
    return dict.fromkeys(names, str(blocked / "x"))


def cached(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """The cached kernels: inode and time of writing (numba replaces whole files), and content."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*.nb[ic]"))
    }


def test_kernels_work_where_no_cache_can_be_made(package: Path) -> None:
    run_copy(package, COMBINED, nowhere(package))
    assert cached(package) == {}


def test_a_second_process_loads_the_first_ones_kernels(package: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run_copy(package, COMBINED, {"NUMBA_CACHE_DIR": str(cache)})
    written = cached(cache)
    assert {name[-4:] for name in written if "_combine" in name} == {".nbi", ".nbc"}
    run_copy(package, COMBINED, {"NUMBA_CACHE_DIR": str(cache)})
    assert cached(cache) == written


def test_kernels_are_cached_beside_the_module_where_that_is_writable(package: Path) -> None:
    environment = nowhere(package)
    (package / "amulet_gguf" / "method" / "__pycache__").unlink()
    run_copy(package, ARGMAX, environment)
    assert any("argmax" in name for name in cached(package / "amulet_gguf" / "method" / "__pycache__"))
