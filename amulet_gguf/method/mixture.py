"""How branches become one distribution: which are needed, and with which coefficients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from amulet_gguf.method.arrays import Float32Array, Float64Array, Tokens
from amulet_gguf.method.echo import withhold
from amulet_gguf.method.realign import combine_unchecked, log_plausibility


def coefficients(
    weights: Sequence[float], strength: float, has_contrast: bool = False
) -> tuple[float, ...]:
    """Return the coefficients of (base, preference 1, preference 2, …); they sum to 1.

    `x = base + sum_k s w_k (pref_k - base)` is `(1 - s sum_k w_k) base + sum_k s w_k pref_k`. With a
    contrast, whose coefficient comes last, what lies beyond ordinary prompting p (that is, s = 1) leads
    away from it instead of from the base: `x = p + (s - 1) (p - contrast)`.
    """
    if has_contrast and strength > 1:
        prompted = coefficients(weights, 1.0)
        return (*(strength * amount for amount in prompted), 1.0 - strength)
    scaled = [strength * weight for weight in weights]
    base = 1.0 - math.fsum(scaled)
    if abs(base) <= 2.0**-50 * math.fsum(map(abs, scaled)):
        base = 0.0  # what rounding left: it must not count as a branch, or as extrapolation
    return (base, *scaled, 0.0) if has_contrast else (base, *scaled)


def is_a_mean(coefficients: Sequence[float]) -> bool:
    """Whether nothing is amplified, so that nothing is to be guarded: all lie from 0 to 1."""
    return all(0 <= amount <= 1 for amount in coefficients)


@dataclass(frozen=True)
class Realignment:
    """Which branches a generation needs, and how they become one distribution.

    Attributes:
        branches: 0 for the base, k for preference k, behind them the contrast.
        coefficients: of these branches, summing to 1.
        reference: their coefficients in ordinary prompting (strength 1), which judges plausibility.
        plausibility: 0 where there is nothing to guard.
    """

    branches: tuple[int, ...]
    coefficients: tuple[float, ...]
    reference: tuple[float, ...]
    plausibility: float


def realign(
    weights: Sequence[float],
    strength: float,
    plausibility: float,
    *,
    until: float | None = None,
    has_contrast: bool = False,
    keep_branches: bool = False,
) -> Realignment:
    """Say what a generation needs: at strength 0 the base alone, at 1 one preference alone.

    Where all coefficients lie between 0 and 1, the result is a mean of the branches. It promotes no
    token that all of them find improbable, so plausibility is left out, and so are unused branches,
    unless `keep_branches`: the strength may then change at any token. With a contrast, the base is left
    out where no strength from `strength` to `until` needs it.
    """
    passed = [strength, *([] if until is None else [until, max(until, min(strength, 1.0))])]
    found = [coefficients(weights, each, has_contrast) for each in passed]
    amounts, reference = found[0], coefficients(weights, 1.0, has_contrast)
    branches = tuple(range(len(amounts)))
    is_mean = all(map(is_a_mean, found))
    if is_mean:
        plausibility = 0.0
    if not keep_branches and (is_mean or has_contrast):
        needed = found if is_mean else [*found, reference]
        branches = tuple(branch for branch in branches if any(each[branch] != 0 for each in needed))
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

    #: What is left of it is none: a strength of 1 needs no base any more.
    NEGLIGIBLE: ClassVar[float] = 0.02

    @property
    def is_constant(self) -> bool:
        return self.tokens == 0 or self.strength <= self.floor

    def at(self, t: int) -> float:
        """Return the strength at token t."""
        if self.is_constant:
            return self.strength
        left = (self.strength - self.floor) * math.exp(-t / self.tokens)
        return self.floor + (left if left > self.NEGLIGIBLE else 0.0)


@dataclass(frozen=True)
class _Token:
    """How one token is combined.

    Attributes:
        needed: branches, ascending, whose logits count.
        coefficients, reference: (N,) of these branches.
        is_mean: see `is_a_mean`.
    """

    strength: float
    needed: tuple[int, ...]
    coefficients: Float64Array
    reference: Float64Array
    is_mean: bool


class Mixture:
    """How the logits of B branches become one distribution, token by token.

    It counts the tokens that it is asked for: the fade of another one begins anew. Each token needs the
    logits of some branches alone: those with a coefficient, and those that judge what is amplified.

    Attributes:
        coefficients: (B,) float64, summing to 1 (see `amulet_gguf.method.realign.combine`); where the
            strength fades, those of the first token.
        reference: (B,) coefficients of ordinary prompting, summing to 1: what judges plausibility, and
            whether realignment changed a token. A mean of branches that do not tell it judges itself.
        margin: of plausibility, in nats.
        fade: of the strength.
        withheld: tokens that are not amplified.
    """

    def __init__(
        self,
        coefficients: Sequence[float],
        reference: Sequence[float],
        plausibility: float = 0.0,
        *,
        fade: Fade | None = None,
        at: Callable[[float], Sequence[float]] | None = None,
        withheld: Tokens | None = None,
    ) -> None:
        self.coefficients = np.array(coefficients, np.float64)
        self.reference = np.array(reference, np.float64)
        self.margin = log_plausibility(plausibility)
        self.fade = fade or Fade(1.0 - self.coefficients[0])
        self._at = at
        self.withheld = withheld
        self._n_combined = 0
        self._next = self._last = self._token(self.fade.at(0), self.coefficients)

    def anew(self) -> Mixture:
        """Return the same mixture from its first token on."""
        other = copy.copy(self)
        other._n_combined = 0
        other._next = other._last = other._token(self.fade.at(0), self.coefficients)
        return other

    @property
    def needed(self) -> tuple[int, ...]:
        """The branches, ascending, whose logits the next token needs."""
        return self._next.needed

    @property
    def strength(self) -> float:
        """Of the token that was combined last, or of the first."""
        return self._last.strength

    @property
    def judge(self) -> Float64Array:
        """(N,) the reference of the token that was combined last, for the branches it needed."""
        return self._last.reference

    def combine(
        self,
        logits: Float32Array,
        out: Float32Array,
        is_plain: Callable[[int], bool] | None = None,
    ) -> int:
        """Combine the (N, V) logits of the `needed` branches into `out` (V,).

        Args:
            is_plain: tells whether a token would not be a matter of style. Where ordinary prompting's
                best one is none, the strength is 1.

        Returns:
            the best token of ordinary prompting.
        """
        token = self._next
        margin = -math.inf if token.is_mean else self.margin
        prompted = combine_unchecked(logits, token.coefficients, margin, token.reference, out)
        if self.withheld is not None and not token.is_mean:
            withhold(logits, token.coefficients, token.reference, self.withheld, out)
        self._last = token
        if is_plain is not None and self._may_be_plain(token) and is_plain(prompted):
            self._last = replace(token, strength=1.0, coefficients=token.reference)
            combine_unchecked(logits, token.reference, -math.inf, token.reference, out)
        self._n_combined += 1
        strength = self.fade.at(self._n_combined)
        if self._at is not None and strength != token.strength:
            self._next = self._token(strength, np.array(self._at(strength), np.float64))
        return prompted

    def _may_be_plain(self, token: _Token) -> bool:
        """Whether a token can be written as ordinary prompting does: that extrapolates nothing."""
        return not token.is_mean and token.strength > 1 and is_a_mean(token.reference.tolist())

    def _token(self, strength: float, coefficients: Float64Array) -> _Token:
        is_mean = is_a_mean(coefficients.tolist())
        counts = coefficients != 0
        if not is_mean:
            counts |= self.reference != 0
        is_judged = bool((counts | (self.reference == 0)).all())
        (needed,) = np.nonzero(counts)
        reference = self.reference if is_judged else coefficients
        return _Token(strength, tuple(needed.tolist()), coefficients[needed], reference[needed], is_mean)
