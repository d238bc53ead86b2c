"""The paper's update, written down literally in float64, as reference for the tests.

Nothing here knows that the game collapses to one number, and nothing here is shared with the package.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


def log_softmax(logits: npt.ArrayLike) -> Float64Array:
    """Return log-probabilities of (V,) logits; -inf stays -inf."""
    values = np.asarray(logits, np.float64)
    values = values - values.max()
    shifted: Float64Array = values - np.log(np.exp(values).sum())
    return shifted


def ftrl(
    base: npt.ArrayLike,
    pref: npt.ArrayLike,
    alpha: float = 2.0,
    lam: float = 2.0,
    eta: float = 10.0,
    iterations: int = 60,
) -> Float64Array:
    """Play the game of one token, T rounds of follow-the-regularized-leader; return log pi_{T+1}."""
    r = log_softmax(base)
    p = log_softmax(pref)
    log_pi = p
    sum_of_q = np.zeros_like(p)
    for t in range(1, iterations + 1):
        sum_of_q = sum_of_q + alpha * (log_pi - r)
        numerator = lam * p + sum_of_q / t + log_pi / (eta * t)
        log_pi = log_softmax(numerator / (lam + 1 / (eta * t)))
    return log_pi


def exact_strength(alpha: Fraction, lam: Fraction, eta: Fraction, iterations: int) -> Fraction:
    """Return 1 + g_{T+1} of the recurrence in exact arithmetic: every sum anew, nothing rounded."""
    g = [Fraction(0)]
    for t in range(1, iterations + 1):
        mean = sum((1 + previous for previous in g), Fraction(0)) / t
        g.append((alpha * mean + g[-1] / (eta * t)) / (lam + 1 / (eta * t)))
    return 1 + g[-1]
