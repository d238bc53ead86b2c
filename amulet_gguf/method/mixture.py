"""How branches become one distribution: which are needed, and with which coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amulet_gguf.method.adaptive import adapted, withhold
from amulet_gguf.method.arrays import Float32Array, Tokens
from amulet_gguf.method.realign import combine_unchecked, log_plausibility
from amulet_gguf.settings import Adapt


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


class Mixture:
    """How the logits of B branches become one distribution.

    Attributes:
        coefficients: (B,) float64, summing to 1 (see `amulet_gguf.method.realign.combine`).
        reference: (B,) coefficients of ordinary prompting, summing to 1: what judges plausibility, and
            whether realignment changed a token.
        margin: of plausibility, in nats.
        adapt: how far each token goes from `anchor` to `coefficients`.
        anchor: (B,) coefficients without extrapolation; needed unless adapt is "none".
        withheld: tokens that are not amplified.
    """

    def __init__(
        self,
        coefficients: Sequence[float],
        reference: Sequence[float],
        plausibility: float = 0.0,
        *,
        adapt: Adapt = "none",
        anchor: Sequence[float] = (),
        withheld: Tokens | None = None,
    ) -> None:
        self.coefficients = np.array(coefficients, np.float64)
        self.reference = np.array(reference, np.float64)
        self.margin = log_plausibility(plausibility)
        self.adapt = adapt
        self.anchor = np.array(anchor, np.float64)
        self.withheld = withheld

    def combine(self, logits: Float32Array, out: Float32Array) -> int:
        """Combine (B, V) logits into `out` (V,); return the best token of ordinary prompting."""
        coefficients = adapted(logits, self.coefficients, self.anchor, self.reference, self.adapt)
        prompted = combine_unchecked(logits, coefficients, self.margin, self.reference, out)
        if self.withheld is not None:
            withhold(logits, coefficients, self.reference, self.withheld, out)
        return prompted
