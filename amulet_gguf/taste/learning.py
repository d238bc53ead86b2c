"""What choices between two answers say of a person's weights: sparse Bayesian logistic regression.

Bradley and Terry's model: of two answers the one with the larger utility is chosen, with probability
`sigmoid(u_1 - u_2)`, and the utility is linear in the answers' features. People err, so that a share of
choices is taken for chance. The prior knows that a taste is about few things: most weights are exactly
zero, and which are not is part of the question ("spike and slab"). The few subsets of attributes there
are can all be fitted, each by Newton's method with Laplace's approximation, from which the posterior is
sampled by importance.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from amulet_gguf.method.arrays import Float64Array

#: Attributes that a taste can be about.
MAX_ATTRIBUTES: Final = 3
#: Probability that it is about none, one, two or three.
_SIZES: Final = (0.05, 0.5, 0.3, 0.15)
#: Standard deviation of the prior of a weight that is not zero, for features of scale 1.
PRIOR: Final = 4.0
#: Share of choices that say the opposite of what is meant.
ERRORS: Final = 0.1
#: A feature at most, in nats per token: the plausibility mask of the default cuts a token's at as much.
MAX_RATIO: Final = -math.log(0.2)
_N_SAMPLES: Final = 2000
#: Size of a feature's differences before any was seen, in nats per token, and what that counts for.
_TYPICAL: Final = 0.07
_N_TYPICAL: Final = 10
_SPREAD: Final = 1.3  # of where samples are looked for: tails are longer than the approximation's
_MAX_STEPS: Final = 100
_MAX_HALVINGS: Final = 10
_TOLERANCE: Final = 1e-3  # of a weight: importance makes up for the rest


@dataclass(frozen=True)
class Belief:
    """What is known of the weights of A attributes.

    Attributes:
        samples: (n, A) weights from the posterior, for features divided by `scale`; most are 0.
        scale: (A,) positive, of the features' differences.
    """

    samples: Float64Array
    scale: Float64Array

    @property
    def mean(self) -> Float64Array:
        """(A,) expected weights."""
        return np.asarray(self.samples.mean(axis=0))

    @property
    def deviation(self) -> Float64Array:
        """(A,) standard deviations."""
        return np.asarray(self.samples.std(axis=0))

    @property
    def sureness(self) -> Float64Array:
        """(A,) probability, 0 to 1, that a weight is not zero and has the sign of most samples."""
        return np.asarray(np.maximum(*((s * self.samples > 0).mean(axis=0) for s in (1, -1))))

    def information(self, differences: Float64Array) -> Float64Array:
        """Return what the answers to questions are expected to teach, (n,) in nats.

        That is the mutual information of an answer and the weights: most where those that are possible
        disagree on it, and each of them is certain.

        Args:
            differences: (n, A) of the features of the two answers in each question.
        """
        x = differences / self.scale
        chances = ERRORS + (1 - 2 * ERRORS) * _sigmoid(self.samples @ x.T)
        return np.asarray(_entropy(chances.mean(axis=0)) - _entropy(chances).mean(axis=0))


def fit(differences: Float64Array) -> Belief:
    """Return what choices teach; the same choices, the same belief.

    Args:
        differences: (n, A) of the features of the better and the worse answer, n >= 0, A >= 1; NaN where
            one is not known.
    """
    n, n_attributes = differences.shape
    scale = _scale(differences)
    padded = np.concatenate([np.nan_to_num(differences / scale), np.zeros((n, 1))], axis=1)
    subsets, log_prior = _subsets(n_attributes)
    x = padded[:, subsets].transpose(1, 0, 2)  # (M, n, K); a subset of fewer has features of 0
    modes, curvatures = _modes(x)
    roots = np.linalg.cholesky(np.linalg.inv(curvatures)) * _SPREAD
    log_volume = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)
    evidence = log_prior + _log_joint(_log_chances(x, modes), modes) + log_volume
    shares = np.exp(evidence - evidence.max())
    shares /= shares.sum()

    random = np.random.default_rng(0)
    drawn = random.choice(len(subsets), 2 * _N_SAMPLES, p=shares)
    normal = random.normal(size=(len(drawn), subsets.shape[1]))
    weights = modes[drawn] + np.einsum("skl,sl->sk", roots[drawn], normal)
    samples = np.zeros((len(drawn), n_attributes + 1))
    np.put_along_axis(samples, subsets[drawn], weights, axis=1)
    samples[:, -1] = 0.0
    # The approximation is where to look; how probable each is, the posterior says.
    log_proposed = np.log(shares[drawn]) - log_volume[drawn] - 0.5 * (normal**2).sum(axis=1)
    log_true = log_prior[drawn] + _log_joint(_log_chances(padded, samples), weights)
    share = np.exp(log_true - log_proposed - (log_true - log_proposed).max())
    kept = random.choice(len(drawn), _N_SAMPLES, p=share / share.sum())
    return Belief(samples[kept, :-1], scale)


def _log_chances(x: Float64Array, weights: Float64Array) -> Float64Array:
    """Return log P of all choices, (M,), of features (n, K) or (M, n, K) and weights (M, K)."""
    utilities = (x @ weights[..., None])[..., 0] if x.ndim == 3 else weights @ x.T
    return np.asarray(np.log(ERRORS + (1 - 2 * ERRORS) * _sigmoid(utilities)).sum(axis=1))


def _log_joint(log_chances: Float64Array, weights: Float64Array) -> Float64Array:
    """Return log P of choices and weights (M, K), up to a constant."""
    return np.asarray(log_chances - (weights**2).sum(axis=1) / (2 * PRIOR**2))


def _subsets(n_attributes: int) -> tuple[np.ndarray, Float64Array]:
    """Return all (M, K) subsets of at most K attributes, filled up with `n_attributes`, and their log
    prior."""
    size = min(MAX_ATTRIBUTES, n_attributes)
    found = [each for k in range(size + 1) for each in itertools.combinations(range(n_attributes), k)]
    log_prior = [math.log(_SIZES[len(each)] / math.comb(n_attributes, len(each))) for each in found]
    return (
        np.array([[*each, *[n_attributes] * (size - len(each))] for each in found]),
        np.array(log_prior),
    )


def _modes(x: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return where the posterior of each subset's weights is largest, (M, K), and its curvature
    there, (M, K, K), with Fisher's information in place of the second derivatives."""
    n_subsets, _, size = x.shape
    modes = np.zeros((n_subsets, size))
    prior = np.eye(size) / PRIOR**2
    curvatures = np.broadcast_to(prior, (n_subsets, size, size))
    for _ in range(_MAX_STEPS):
        plain = _sigmoid(np.einsum("mnk,mk->mn", x, modes))
        chances = ERRORS + (1 - 2 * ERRORS) * plain
        slopes = (1 - 2 * ERRORS) * plain * (1 - plain)
        gradients = np.einsum("mnk,mn->mk", x, slopes / chances) - modes / PRIOR**2
        weighted = x * (slopes**2 / (chances * (1 - chances)))[..., None]
        curvatures = weighted.transpose(0, 2, 1) @ x + prior
        steps = np.linalg.solve(curvatures, gradients[..., None])[..., 0]
        before = _log_joint(_log_chances(x, modes), modes)
        for _ in range(_MAX_HALVINGS):  # it is not convex: too long a step would swing around the mode
            enough = before + (steps * gradients).sum(axis=1) / 4
            falls = _log_joint(_log_chances(x, modes + steps), modes + steps) < enough
            if not falls.any():
                break
            steps[falls] /= 2
        modes = modes + steps
        if np.abs(steps).max(initial=0.0) < _TOLERANCE:
            break
    return modes, np.asarray(curvatures, np.float64)


def _scale(differences: Float64Array) -> Float64Array:
    """Return the size of each feature's differences."""
    squares = np.nansum(differences**2, axis=0) + _N_TYPICAL * _TYPICAL**2
    n_known = np.isfinite(differences).sum(axis=0)
    return np.asarray(np.sqrt(squares / (n_known + _N_TYPICAL)))


def _sigmoid(x: Float64Array) -> Float64Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def _entropy(p: Float64Array) -> Float64Array:
    return np.asarray(-p * np.log(p) - (1 - p) * np.log1p(-p))
