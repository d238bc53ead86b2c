"""The method: how far to go beyond the preference prompt, and the kernel that goes there.

Amulet (Zhang et al., ICLR 2025, arXiv 2502.19148) plays an online-learning game of T rounds at every
token between the base distribution r and the preference distribution p. Each of its iterates is
`p + g_t (p - r)` in log space, up to a constant that softmax ignores, and g_t depends on the game's
parameters alone. So the T rounds are one number, found once (`strength`), and one affine combination
of logits per token (`combine`).
"""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Final

import numpy as np
import numpy.typing as npt

from amulet_gguf.errors import NonFiniteLogitsError, SettingError, shown
from amulet_gguf.method._kernel import kernel
from amulet_gguf.method.arrays import BLOCK, Float32Array, Float64Array

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


def strength(alpha: float = 2.0, lam: float = 2.0, eta: float = 10.0, iterations: int = 60) -> float:
    """Return the strength s to which T rounds of the Amulet game collapse; the defaults give 5.648699.

    The game's update is `log pi_{t+1} ∝ [lam p + mean_i Q_i + log pi_t / (eta t)] / (lam + 1 / (eta t))`
    with `Q_i = alpha (log pi_i - r)`. Writing `log pi_t = p + g_t (p - r)` gives `g_1 = 0` and

        g_{t+1} = [alpha mean_{i<=t}(1 + g_i) + g_t / (eta t)] / (lam + 1 / (eta t)),    s = 1 + g_{T+1}.

    Args:
        alpha: weight of the contrast between preference and base, >= 0.
        lam: weight of the preference distribution (the paper's lambda), > 0.
        eta: learning rate, > 0.
        iterations: rounds T, 0 to 100,000; 0 is ordinary prompting (s = 1).

    Raises:
        SettingError: an argument out of range, or a result too large to be of use.
    """
    for name, value, positive in (("alpha", alpha, False), ("lam", lam, True), ("eta", eta, True)):
        # Compared, not converted: a whole number may be too large for a float.
        is_number = isinstance(value, Real) and 0 <= value <= sys.float_info.max
        if not is_number or (positive and value == 0):
            bound = "> 0" if positive else ">= 0"
            raise SettingError(f"{name} must be a finite number {bound}, got {shown(value)}")
    if not isinstance(iterations, int) or not 0 <= iterations <= 100_000:
        raise SettingError(f"iterations must be from 0 to 100000, got {shown(iterations)}")
    g = 0.0
    total = 0.0  # sum of 1 + g_i
    for t in range(1, iterations + 1):
        total += 1.0 + g
        inertia = 1.0 / (eta * t)
        g = (alpha * total / t + g * inertia) / (lam + inertia)
    if not math.isfinite(g):
        raise SettingError(
            f"alpha={alpha}, lam={lam}, eta={eta}, iterations={iterations} give an infinite "
            "strength: lower alpha or iterations, or raise lam"
        )
    return 1.0 + g


def combine(
    logits: Float32Array,
    coefficients: npt.ArrayLike,
    plausibility: float = 0.0,
    reference: npt.ArrayLike | None = None,
    out: Float32Array | None = None,
) -> Float32Array:
    """Combine the logits of a generation's branches into one row: `out = coefficients @ logits`.

    Row 0 is the base, the others are preferences. For one preference and strength s the coefficients
    are (1 - s, s), which is `r + s (p - r)`; `amulet_gguf.method.mixture.coefficients` makes them
    for any number. They sum to 1, so log-softmax is not needed first: its constants cancel.

    Plausibility rules tokens out *before* extrapolation can promote them (the constraint of contrastive
    decoding, Li et al. 2023, arXiv 2210.15097): tokens that ordinary prompting finds less probable than
    `plausibility` times its best token become -inf; the best token is always kept. What ordinary
    prompting says is a combination of the rows too, at strength 1. Its coefficients are the `reference`:
    with one preference, that preference's row. With several, a token that one of them rules out survives
    if the others make up for it, and a negative weight counts against its tokens.

    Args:
        logits: (B, V) float32, finite, C-contiguous, one row per branch; B, V >= 1.
        coefficients: (B,) finite, summing to 1 (within 1e-6 of their total size).
        plausibility: from 0 (no mask) to 1 (only the best tokens of ordinary prompting).
        reference: (B,) finite, summing to 1: coefficients of ordinary prompting. None means the only
            row (B = 1) or the preference's (B = 2).
        out: (V,) float32, contiguous, not overlapping `logits`; allocated when None.

    Returns:
        `out`: (V,) float32 logits, masked tokens -inf.

    Raises:
        SettingError: wrong shape or dtype, coefficients or plausibility out of range.
        NonFiniteLogitsError: NaN or infinity among the logits, or a result beyond float32.
    """
    if not isinstance(logits, np.ndarray) or logits.ndim != 2 or logits.dtype != np.float32:
        got = f"{getattr(logits, 'dtype', type(logits).__name__)} {getattr(logits, 'shape', '')}"
        raise SettingError(f"logits: expected a float32 array of shape (B, V), got {got}")
    n_rows, n_vocab = logits.shape
    if n_rows == 0 or n_vocab == 0:
        raise SettingError(f"logits: expected at least one row and column, got {logits.shape}")
    if not logits.flags.c_contiguous:
        raise SettingError("logits: expected a C-contiguous array")
    weights = _affine("coefficients", coefficients, n_rows)
    if not isinstance(plausibility, Real) or not 0.0 <= plausibility <= 1.0:
        raise SettingError(f"plausibility must be from 0 to 1, got {shown(plausibility)}")
    if reference is None:
        if n_rows > 2 and plausibility > 0:
            raise SettingError(f"reference is needed to mask a combination of {n_rows} rows")
        reference = np.eye(n_rows)[n_rows - 1]
    reference = _affine("reference", reference, n_rows)
    if out is None:
        out = np.empty(n_vocab, np.float32)
    elif not isinstance(out, np.ndarray) or out.shape != (n_vocab,) or out.dtype != np.float32:
        raise SettingError(f"out: expected a float32 array of shape ({n_vocab},)")
    elif not out.flags.c_contiguous or not out.flags.writeable:
        raise SettingError("out: expected a contiguous, writeable array")
    elif np.may_share_memory(out, logits):
        raise SettingError("out must not overlap logits")
    combine_unchecked(logits, weights, log_plausibility(plausibility), reference, out)
    return out


def log_plausibility(plausibility: float) -> float:
    """Return where the mask begins, in nats below the best logit of ordinary prompting (-inf: none)."""
    return math.log(plausibility) if plausibility > 0 else -math.inf


def combine_unchecked(
    logits: Float32Array,
    coefficients: Float64Array,
    margin: float,
    reference: Float64Array,
    out: Float32Array,
) -> int:
    """Do the work of `combine` on good arguments; return the best token of ordinary prompting.

    Args:
        margin: `log_plausibility(plausibility)`.

    Raises:
        NonFiniteLogitsError: as `combine`.
    """
    best = _combine(logits, coefficients, margin, reference, out)
    if best < 0:
        raise NonFiniteLogitsError(
            "the model's logits hold NaN or infinity: the model file is damaged, or its computation "
            "overflows on this device"
        )
    return best


def mixed(logits: Float32Array, weights: Float64Array) -> Float32Array:
    """Return `weights @ logits`, a view where one row alone counts."""
    (used,) = np.nonzero(weights)
    if len(used) == 1:
        row: Float32Array = logits[used[0]]
        return row
    return np.asarray(weights @ logits, np.float32)


def _affine(name: str, values: npt.ArrayLike, n_rows: int) -> Float64Array:
    """Return `values` as (n_rows,) float64 after checking that they sum to 1."""
    try:
        array = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise SettingError(f"{name}: expected {n_rows} numbers, got {shown(values)}") from None
    if array.shape != (n_rows,):
        raise SettingError(f"{name}: expected shape ({n_rows},), got {array.shape}")
    if not np.isfinite(array).all():
        raise SettingError(f"{name} must be finite, got {array.tolist()}")
    if abs(array.sum() - 1.0) > 1e-6 * max(1.0, np.abs(array).sum()):
        raise SettingError(f"{name} must sum to 1, got {array.tolist()}")
    return array


# The kernels go through the vocabulary in blocks, and each block is a slice: over a slice's own indices
# LLVM makes vector code, over `start + v` it does not. The two reductions work on the bits of the
# floats for the same reason: NaN and signed zeros keep it from vectorizing a floating-point maximum.


@kernel()
def _largest_magnitude(values: Float32Array) -> np.int32:
    """Return the bits of max |values|, which are those of infinity or NaN if there is one."""
    bits = values.view(np.int32)
    largest = np.int32(0)
    for v in range(bits.size):
        largest = max(largest, bits[v] & np.int32(0x7FFFFFFF))
    return largest


@kernel()
def largest_key(values: Float32Array) -> np.int32:
    """Return the largest of float32 values as an integer that ascends with them."""
    bits = values.view(np.int32)
    largest = np.int32(-(2**31))
    for v in range(bits.size):
        largest = max(largest, bits[v] ^ ((bits[v] >> 31) & np.int32(0x7FFFFFFF)))
    return largest


@kernel()
def argmax(values: Float32Array) -> int:
    """Return the index of the first largest of (V,) float32 values, V >= 1, none of them NaN.

    A block that holds 0.0 counts as larger than one whose largest is -0.0.
    """
    largest = np.int32(-(2**31))
    best_start = 0
    for start in range(0, values.size, BLOCK):
        key = largest_key(values[start : start + BLOCK])
        if key > largest:
            largest = key
            best_start = start
    best = best_start
    for v in range(best_start, min(best_start + BLOCK, values.size)):
        if values[v] > values[best]:
            best = v
    return best


@kernel()
def _mix(logits: Float32Array, weights: Float64Array, start: int, mixed: Float64Array) -> None:
    """mixed = weights @ logits[:, start : start + n], (B, V) float32 to (n,), summed in float64."""
    stop = start + mixed.size
    row = logits[0, start:stop]
    for v in range(mixed.size):
        mixed[v] = weights[0] * row[v]
    for b in range(1, logits.shape[0]):
        row = logits[b, start:stop]
        for v in range(mixed.size):
            mixed[v] += weights[b] * row[v]


@kernel()
def _combine(
    logits: Float32Array,
    coefficients: Float64Array,
    margin: float,
    reference: Float64Array,
    out: Float32Array,
) -> int:
    """Combine and mask; return the best token of ordinary prompting, or -1 if not all is finite."""
    n_vocab = logits.shape[1]
    magnitude = np.array([_largest_magnitude(logits.reshape(-1))], np.int32).view(np.float32)[0]
    if not np.abs(coefficients).sum() * magnitude <= _FLOAT32_MAX:  # also where it is NaN
        return -1

    mixed = np.empty(BLOCK, np.float64)
    judged = logits[np.argmax(reference)]
    if np.count_nonzero(reference) > 1:  # else the one that is not 0 is 1, and its row the reference
        judged = np.empty(n_vocab, np.float32)
        for start in range(0, n_vocab, BLOCK):
            part = judged[start : start + BLOCK]
            _mix(logits, reference, start, mixed[: part.size])
            part[:] = mixed[: part.size]
    best = argmax(judged)

    floor = np.float32(judged[best] + margin)
    for start in range(0, n_vocab, BLOCK):
        part = out[start : start + BLOCK]
        judged_part = judged[start : start + BLOCK]
        _mix(logits, coefficients, start, mixed[: part.size])
        for v in range(part.size):
            part[v] = np.float32(mixed[v]) if judged_part[v] >= floor else np.float32(-np.inf)
    return best
