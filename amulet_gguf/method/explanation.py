"""What realignment did to one token: how far it moved the distribution, and to which tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from amulet_gguf.method._kernel import kernel
from amulet_gguf.method.arrays import BLOCK, Float32Array, Float64Array
from amulet_gguf.method.realign import mixed
from amulet_gguf.method.sampling import RULED_OUT, exp_below, log_sum

#: KL in nats from which a token is shaded fully.
FULL: Final = 2.0


@dataclass(frozen=True)
class Alternative:
    """A token that could have been written.

    Attributes:
        token: its id.
        text: its text; bytes that are no whole character show as U+FFFD.
        probability: after realignment, before sampling filters and penalties.
        prompted: under ordinary prompting.
    """

    token: int
    text: str
    probability: float
    prompted: float


@dataclass(frozen=True)
class Explanation:
    """How realignment changed the choice of one token.

    Attributes:
        strength: with which it was realigned.
        divergence: KL(realigned || ordinary prompting), in nats; 0 where nothing was changed.
        probability, prompted: of the token that was chosen, as in `Alternative`.
        alternatives: the best of either distribution, by falling probability.
    """

    strength: float
    divergence: float
    probability: float
    prompted: float
    alternatives: tuple[Alternative, ...]

    @property
    def shade(self) -> float:
        """How strongly to shade the token, from 0 to 1: the root of its share of `FULL`."""
        return float(min(1.0, self.divergence / FULL) ** 0.5)


def explain(
    logits: Float32Array,
    reference: Float64Array,
    row: Float32Array,
    token: int,
    token_bytes: Callable[[int], bytes],
    n_alternatives: int,
    strength: float = 1.0,
) -> Explanation:
    """Compare a combination with ordinary prompting.

    Args:
        logits: (B, V) float32, finite, of the branches.
        reference: (B,) coefficients of ordinary prompting.
        row: (V,) float32, the combination, -inf where masked.
        token: the one that was chosen.
        token_bytes: gives a token's bytes.
        n_alternatives: how many of each distribution's best to report.
        strength: to be told, too.
    """
    plain = mixed(logits, reference)
    log_row, log_plain = log_sum(row), log_sum(plain)
    best = np.empty(min(n_alternatives, row.size), np.int32)
    found: set[int] = set()
    for values in (row, plain):
        largest(values, best)
        found.update(each for each in best.tolist() if values[each] > RULED_OUT)

    def probabilities(token: int) -> tuple[float, float]:
        return math.exp(float(row[token]) - log_row), math.exp(float(plain[token]) - log_plain)

    alternatives = [
        Alternative(each, token_bytes(each).decode("utf-8", "replace"), *probabilities(each))
        for each in found
    ]
    chances = probabilities(token)
    alternatives.sort(key=lambda each: (-each.probability, -each.prompted, each.token))
    return Explanation(
        strength=strength,
        divergence=kl(row, log_row, plain, log_plain),
        probability=chances[0],
        prompted=chances[1],
        alternatives=tuple(alternatives),
    )


@kernel()
def kl(row: Float32Array, log_row: float, plain: Float32Array, log_plain: float) -> float:
    """Return KL(row || plain) of two rows of (V,) logits, in nats; `row` may hold -inf.

    Args:
        log_row, log_plain: their log sum exp.
    """
    weights = np.empty(BLOCK, np.float32)
    total = 0.0
    for start in range(0, row.size, BLOCK):
        a = row[start : start + BLOCK]
        b = plain[start : start + BLOCK]
        exp_below(a, np.float32(log_row), 1.0, weights)
        for v in range(a.size):
            if weights[v] > 0:
                total += weights[v] * ((np.float64(a[v]) - log_row) - (np.float64(b[v]) - log_plain))
    return float(max(0.0, total))


@kernel()
def largest(values: Float32Array, best: npt.NDArray[np.int32]) -> None:
    """Write the indices of the largest values into `best`, falling, ties by index."""
    k = best.size
    count = 0
    for v in range(values.size):
        if count == k and values[v] <= values[best[k - 1]]:
            continue
        i = min(count, k - 1)
        while i > 0 and values[best[i - 1]] < values[v]:
            best[i] = best[i - 1]
            i -= 1
        best[i] = v
        count = min(count + 1, k)
