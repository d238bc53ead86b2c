"""A strength that adapts per token, and words that are not amplified.

Both remedies act between the branches' logits and their combination. They matter only where a
combination extrapolates; interpolations are left alone.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from amulet_gguf.method._kernel import kernel
from amulet_gguf.method.arrays import BLOCK, Float32Array, Float64Array
from amulet_gguf.method.realign import argmax
from amulet_gguf.method.sampling import exp_below
from amulet_gguf.settings import Adapt

_NEGLIGIBLE: Final = 1e-7  # mean probability below which a token is left out of a divergence


def adapted(
    logits: Float32Array,
    coefficients: Float64Array,
    anchor: Float64Array,
    reference: Float64Array,
    adapt: Adapt,
) -> Float64Array:
    """Return (B,) coefficients between those of no extrapolation and the full ones, for this token.

    The way from strength 1 (0 where the strength is negative) to the full one is gone by a share
    from 0 to 1:

    - "divergence": the Jensen-Shannon divergence, in bits, of base and ordinary prompting, as in
      AdaCAD (Wang et al. 2024, arXiv 2409.07394). Where the preference says nothing about a token,
      nothing is amplified.
    - "entropy": 1 - 1 / perplexity of ordinary prompting. A token that prompting is certain
      of (the rest of a word, an idiom) is left to it.

    Args:
        logits: (B, V) float32, finite; row 0 is the base.
        coefficients, reference: (B,), see `amulet_gguf.method.realign.combine`.
        anchor: (B,) coefficients where the share is 0.
    """
    if adapt == "none":
        return coefficients
    reference_row = mixed(logits, reference)
    if adapt == "entropy":
        share = 1.0 - np.exp(-_entropy(reference_row))
    else:
        share = _divergence(logits[0], reference_row)
    return np.asarray(anchor + share * (coefficients - anchor))


def withhold(
    logits: Float32Array,
    coefficients: Float64Array,
    reference: Float64Array,
    tokens: npt.NDArray[np.int32],
    out: Float32Array,
) -> None:
    """Take from `tokens` what the combination `out` gives them beyond ordinary prompting.

    In log-probabilities a token's gain is `x - p`. Logits carry their rows' constants, so these are
    computed first.

    Args:
        logits: (B, V) float32, finite.
        coefficients, reference: (B,).
        tokens: (n,) distinct.
        out: (V,) float32, the combination; changed in place.
    """
    constants = np.array([log_sum(row) for row in logits])
    shift = float((coefficients - reference) @ constants)
    plain = reference @ logits[:, tokens].astype(np.float64) + shift
    out[tokens] = np.minimum(out[tokens], plain.astype(np.float32))


def mixed(logits: Float32Array, weights: Float64Array) -> Float32Array:
    """Return `weights @ logits`, a view where one row alone counts."""
    (used,) = np.nonzero(weights)
    if len(used) == 1:
        row: Float32Array = logits[used[0]]
        return row
    return np.asarray(weights @ logits, np.float32)


@kernel()
def log_sum(logits: Float32Array) -> float:
    """Return log sum exp of (V,) logits."""
    weights = np.empty(BLOCK, np.float32)
    peak = logits[argmax(logits)]
    total = 0.0
    for start in range(0, logits.size, BLOCK):
        total += exp_below(logits[start : start + BLOCK], peak, 1.0, weights)
    return float(peak + np.log(total))


@kernel()
def _entropy(logits: Float32Array) -> float:
    """Return the entropy of (V,) logits, in nats."""
    weights = np.empty(BLOCK, np.float32)
    peak = logits[argmax(logits)]
    total = 0.0
    moment = 0.0
    for start in range(0, logits.size, BLOCK):
        block = logits[start : start + BLOCK]
        total += exp_below(block, peak, 1.0, weights)
        for v in range(block.size):
            moment += weights[v] * (block[v] - peak)
    return float(max(0.0, np.log(total) - moment / total))


@kernel()
def _divergence(first: Float32Array, second: Float32Array) -> float:
    """Return the Jensen-Shannon divergence of two rows of (V,) logits, in bits: 0 to 1."""
    log_first = np.float32(log_sum(first))
    log_second = np.float32(log_sum(second))
    p = np.empty(BLOCK, np.float32)
    q = np.empty(BLOCK, np.float32)
    total = 0.0
    for start in range(0, first.size, BLOCK):
        a = first[start : start + BLOCK]
        b = second[start : start + BLOCK]
        exp_below(a, log_first, 1.0, p)
        exp_below(b, log_second, 1.0, q)
        for v in range(a.size):
            mean = 0.5 * (np.float64(p[v]) + np.float64(q[v]))
            if mean > _NEGLIGIBLE:
                log_mean = np.log(mean)
                total += 0.5 * p[v] * (np.float64(a[v] - log_first) - log_mean)
                total += 0.5 * q[v] * (np.float64(b[v] - log_second) - log_mean)
    return float(min(1.0, max(0.0, total / np.log(2.0))))
