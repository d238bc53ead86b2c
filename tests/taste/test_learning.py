"""What choices teach: against integration of the posterior as it is written down, and made-up people."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amulet_gguf.method.arrays import Float64Array
from amulet_gguf.taste import learning
from amulet_gguf.taste.learning import ERRORS, PRIOR, Belief, fit

SEEDS = st.integers(0, 2**32 - 2)


def differences(seed: int, n: int, n_attributes: int) -> Float64Array:
    normal = np.random.default_rng(seed).normal(size=(n, n_attributes))
    return np.asarray(normal * learning._TYPICAL)


def chance(x: Float64Array, weights: Float64Array) -> Float64Array:
    """P(what was chosen), by definition."""
    return np.asarray(ERRORS + (1 - 2 * ERRORS) / (1 + np.exp(-(x @ weights))))


def integrated(x: Float64Array) -> dict[tuple[bool, ...], tuple[float, Float64Array]]:
    """The posterior of two attributes on a grid: probability and mean of each set that matters."""
    grid = np.linspace(-6 * PRIOR, 6 * PRIOR, 401)
    density = np.exp(-(grid**2) / (2 * PRIOR**2)) / (PRIOR * math.sqrt(2 * math.pi))
    density *= grid[1] - grid[0]
    found = {}
    sizes = learning._SIZES
    for matters in itertools.product((False, True), repeat=2):
        axes = [grid if each else np.zeros(1) for each in matters]
        shares = [density if each else np.ones(1) for each in matters]
        weights = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        share = np.multiply.outer(*shares).reshape(-1) * sizes[sum(matters)] / (1, 2, 1)[sum(matters)]
        share = share * chance(x, weights.T).prod(axis=0)
        found[matters] = (share.sum(), (share @ weights) / share.sum())
    total = sum(share for share, _ in found.values())
    return {matters: (share / total, mean) for matters, (share, mean) in found.items()}


@pytest.mark.parametrize("seed", range(5))
def test_the_samples_are_of_the_posterior(seed: int) -> None:
    given_ = differences(seed, 15, 2)
    given_[:, 0] = np.abs(given_[:, 0])  # something to be learned
    belief = fit(given_)
    expected = integrated(given_ / belief.scale)
    for matters, (share, mean) in expected.items():
        of_it = ((belief.samples != 0) == matters).all(axis=1)
        assert of_it.mean() == pytest.approx(share, abs=0.04)
        if share > 0.2:
            np.testing.assert_allclose(belief.samples[of_it].mean(axis=0), mean, atol=0.1 * PRIOR)
    means = sum(share * mean for share, mean in expected.values())
    np.testing.assert_allclose(belief.mean, means, atol=0.1 * PRIOR)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 12), st.integers(1, 5))
def test_each_subset_is_fitted_where_its_posterior_is_largest(
    seed: int, n: int, n_attributes: int
) -> None:
    given_ = differences(seed, n, n_attributes)
    subsets, _ = learning._subsets(n_attributes)
    x = np.concatenate([given_ / learning._TYPICAL, np.zeros((n, 1))], axis=1)[:, subsets].transpose(
        1, 0, 2
    )
    modes, _ = learning._modes(x)

    def log_posterior(weights: Float64Array, features: Float64Array) -> float:
        prior = float(weights @ weights) / (2 * PRIOR**2)
        return float(np.log(chance(features, weights)).sum()) - prior

    for mode, features in zip(modes, x, strict=True):
        best = log_posterior(mode, features)
        for axis in np.eye(len(mode)) * 0.02 * PRIOR:  # another mode may be not far away
            assert best > log_posterior(mode + axis, features) - 0.01
            assert best > log_posterior(mode - axis, features) - 0.01


def test_nothing_chosen_is_the_prior() -> None:
    belief = fit(np.empty((0, 8)))
    counts = (belief.samples != 0).sum(axis=1)
    shares = [(counts == k).mean() for k in range(4)]
    np.testing.assert_allclose(shares, learning._SIZES, atol=0.04)
    assert counts.max() == 3
    assert belief.samples[belief.samples != 0].std() == pytest.approx(PRIOR, rel=0.1)
    assert (belief.sureness < 0.2).all()
    np.testing.assert_allclose(belief.scale, learning._TYPICAL)


def test_the_same_choices_give_the_same_belief() -> None:
    given_ = differences(1, 9, 6)
    np.testing.assert_array_equal(fit(given_).samples, fit(given_).samples)


def test_choices_that_say_the_opposite_cancel() -> None:
    x = differences(1, 8, 3)
    mean = fit(np.concatenate([x, -x])).mean
    assert (np.abs(mean) < 0.3).all()
    assert (fit(x).mean ** 2).sum() > 4 * (mean**2).sum()


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((5, 2)),
        np.full((50, 2), 1e-300),
        np.array([[1e100, 1e-9], [-1e100, 1e-9]]),
        np.ones((300, 1)),
        np.tile([[1.0, -1.0]], (300, 1)),
        differences(0, 200, 16),
    ],
)
def test_extreme_differences_are_survived(x: Float64Array) -> None:
    belief = fit(x)
    assert np.isfinite(belief.samples).all()
    assert (belief.scale > 0).all()
    assert np.isfinite(belief.information(x)).all()


def people(n: int, errors: float = 0.1) -> list[tuple[Float64Array, Belief]]:
    """Some who like the first of eight attributes and dislike the third half as much, and err."""
    hidden = np.array([2.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, 8)) * learning._TYPICAL
        signs = np.sign(x @ hidden) * np.where(rng.random(n) < errors, -1, 1)
        found.append((hidden, fit(x * signs[:, None])))
    return found


def test_people_are_found_out() -> None:
    distances = {}
    for n in (5, 40, 320):
        means = [(hidden, belief.mean) for hidden, belief in people(n)]
        cosines = [mean @ h / np.linalg.norm(mean) / np.linalg.norm(h) for h, mean in means]
        distances[n] = 1 - float(np.mean(cosines))
    assert distances[5] > distances[40] > distances[320]
    assert distances[40] < 0.1
    assert distances[320] < 0.02
    for _, belief in people(320):
        assert (belief.sureness[[0, 2]] > 0.95).all()
        assert (np.delete(belief.sureness, [0, 2]) < 0.3).all()


def test_sureness_is_how_often_the_sign_is_right() -> None:
    right = []
    for seed in range(300):  # people as the prior has them
        rng = np.random.default_rng(seed)
        size = rng.choice(4, p=learning._SIZES)
        hidden = np.zeros(5)
        hidden[rng.permutation(5)[:size]] = rng.normal(size=size) * PRIOR
        x = rng.normal(size=(10, 5)) * learning._TYPICAL
        signs = np.where(rng.random(10) < chance(x / learning._TYPICAL, hidden), 1, -1)
        belief = fit(x * signs[:, None])
        sign = np.where((belief.samples > 0).mean(0) > (belief.samples < 0).mean(0), 1, -1)
        right += list(zip(belief.sureness, np.sign(hidden) == sign, strict=True))
    for low, high in ((0.0, 0.3), (0.3, 0.6), (0.6, 0.85), (0.85, 1.01)):
        told = [each for each in right if low <= each[0] < high]
        sureness, is_right = np.mean(told, axis=0)
        assert len(told) > 30
        assert is_right == pytest.approx(sureness, abs=0.1)


def test_information_is_what_the_answer_takes_from_the_entropy() -> None:
    # By the other of its two definitions: the expected divergence of what is believed after, from now.
    belief = fit(differences(3, 6, 2))
    x = np.array([[0.05, -0.08]])
    p = chance(belief.samples, (x / belief.scale)[0])
    expected = 0.0
    for likelihood in (p, 1 - p):
        after = likelihood / likelihood.sum()
        expected += likelihood.mean() * float((after * np.log(after * len(after))).sum())
    assert belief.information(x)[0] == pytest.approx(expected, rel=1e-6)


def test_nothing_is_learned_from_equal_answers_or_of_what_is_certain() -> None:
    unit = learning._TYPICAL
    belief = fit(np.concatenate([np.tile([[unit, 0.0]], (100, 1)), differences(0, 2, 2) * [0, 1]]))
    equal, certain, open_ = belief.information(np.array([[0.0, 0.0], [3 * unit, 0.0], [0.0, unit]]))
    assert equal == pytest.approx(0, abs=1e-12)
    assert certain < open_ / 3
