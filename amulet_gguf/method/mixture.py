"""How branches become one distribution: which are needed, and with which coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amulet_gguf.method.arrays import Float32Array, Tokens
from amulet_gguf.method.echo import withhold
from amulet_gguf.method.realign import combine_unchecked, log_plausibility


def coefficients(weights: Sequence[float], strength: float) -> tuple[float, ...]:
    """Return the coefficients of (base, preference 1, preference 2, …); they sum to 1.

    `x = base + sum_k s w_k (pref_k - base)` is `(1 - s sum_k w_k) base + sum_k s w_k pref_k`.
    """
    scaled = [strength * weight for weight in weights]
    base = 1.0 - math.fsum(scaled)
    if abs(base) <= 2.0**-50 * math.fsum(map(abs, scaled)):
        base = 0.0  # what rounding left: it must not count as a branch, or as extrapolation
    return (base, *scaled)


@dataclass(frozen=True)
class Realignment:
    """Which branches a generation needs, and how they become one distribution.

    Attributes:
        branches: 0 for the base, k for preference k.
        coefficients: of these branches, summing to 1.
        reference: their coefficients in ordinary prompting (strength 1), which judges plausibility.
        plausibility: 0 where there is nothing to guard.
    """

    branches: tuple[int, ...]
    coefficients: tuple[float, ...]
    reference: tuple[float, ...]
    plausibility: float


def realign(
    weights: Sequence[float], strength: float, plausibility: float, *, keep_branches: bool = False
) -> Realignment:
    """Say what a generation needs: at strength 0 the base alone, at 1 one preference alone.

    Where all coefficients lie between 0 and 1, the result is a mean of the branches. It promotes no
    token that all of them find improbable, so plausibility is left out, and so are unused branches,
    unless `keep_branches`: the strength may then change at any token.
    """
    amounts = coefficients(weights, strength)
    reference = coefficients(weights, 1.0)
    branches = tuple(range(len(amounts)))
    if all(0 <= amount <= 1 for amount in amounts):
        plausibility = 0.0
        if not keep_branches:
            branches = tuple(branch for branch in branches if amounts[branch] != 0)
        if any(reference[branch] != 0 for branch in range(len(amounts)) if branch not in branches):
            reference = amounts
    return Realignment(
        branches,
        tuple(amounts[branch] for branch in branches),
        tuple(reference[branch] for branch in branches),
        plausibility,
    )


@dataclass(frozen=True)
class Fade:
    """A strength that falls while an answer is written: style once set carries itself.

    Attributes:
        strength: at the first token.
        floor: that it comes down to; a strength below it is constant.
        tokens: after which 1/e of what is above the floor is left; 0: it is constant.
    """

    strength: float
    floor: float = 1.0
    tokens: float = 0.0

    @property
    def is_constant(self) -> bool:
        return self.tokens == 0 or self.strength <= self.floor

    def share(self, t: int) -> float:
        """Return how much is left at token t of what is above the floor, from 1 down to 0."""
        return 1.0 if self.is_constant else math.exp(-t / self.tokens)

    def at(self, t: int) -> float:
        """Return the strength at token t."""
        return (
            self.strength
            if self.is_constant
            else (self.floor + (self.strength - self.floor) * self.share(t))
        )


class Mixture:
    """How the logits of B branches become one distribution, token by token.

    It counts the tokens that it is asked for: the fade of another one begins anew.

    Attributes:
        coefficients: (B,) float64, summing to 1 (see `amulet_gguf.method.realign.combine`), at first.
        reference: (B,) coefficients of ordinary prompting, summing to 1: what judges plausibility, and
            whether realignment changed a token.
        margin: of plausibility, in nats.
        fade: of the strength.
        settled: (B,) coefficients that the fade comes down to.
        withheld: tokens that are not amplified.
        strength: of the token that was combined last.
    """

    def __init__(
        self,
        coefficients: Sequence[float],
        reference: Sequence[float],
        plausibility: float = 0.0,
        *,
        fade: Fade | None = None,
        settled: Sequence[float] = (),
        withheld: Tokens | None = None,
    ) -> None:
        self.coefficients = np.array(coefficients, np.float64)
        self.reference = np.array(reference, np.float64)
        self.margin = log_plausibility(plausibility)
        self.fade = fade or Fade(1.0 - self.coefficients[0])
        self.settled = np.array(settled if len(settled) else coefficients, np.float64)
        self.withheld = withheld
        self.strength = self.fade.strength
        self._n_combined = 0

    def combine(self, logits: Float32Array, out: Float32Array) -> int:
        """Combine (B, V) logits into `out` (V,); return the best token of ordinary prompting."""
        self.strength, share = self.fade.at(self._n_combined), self.fade.share(self._n_combined)
        self._n_combined += 1
        coefficients = self.settled + share * (self.coefficients - self.settled)
        prompted = combine_unchecked(logits, coefficients, self.margin, self.reference, out)
        if self.withheld is not None:
            withhold(logits, coefficients, self.reference, self.withheld, out)
        return prompted
