"""One combined row of logits becomes one token.

The stages are llama.cpp's, in llama.cpp's order: biases, penalties, top-k, top-p, min-p, temperature.
Filters thus judge the realigned distribution itself, and temperature only spreads what they kept.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from amulet_gguf.errors import SettingError
from amulet_gguf.method._kernel import kernel
from amulet_gguf.method.arrays import BLOCK, Float32Array
from amulet_gguf.method.realign import argmax, largest_key
from amulet_gguf.method.vocabulary import Vocabulary
from amulet_gguf.settings import Settings

#: Greedy, and nothing more.
PLAIN: Final = Settings(repeat_penalty=1.0)
_BAN: Final = -100.0  # a bias that rules a token out
_BANNED: Final = -1e9  # its logit: no amplification brings it back, and plausibility judges others
FORBIDDEN: Final = -2e9  #: the logit of what may not be written: less than that of a banned token
RULED_OUT: Final = -1e8  # a logit below it is that of either
_MAX_SCALE: Final = 1e30  # leaves the best tokens alone as surely as infinity, without its NaN
_LOWEST: Final = np.finfo(np.float32).min  # below it there are only masked tokens
_FIRST_WINDOW: Final = 4.0  # nats below the best logit; holds the nucleus of most real rows


class Sampler:
    """Chooses the tokens of one generation; equal seeds on equal logits choose equal tokens.

    Of its settings it takes:

    - temperature: 0 takes the most probable token; otherwise logits are divided by it.
    - top_k: keep the k most probable tokens; 0 keeps all.
    - top_p: keep the fewest most probable tokens whose probability reaches this; 1 keeps all.
    - min_p: keep tokens at least this times as probable as the best; 0 keeps all.
    - repeat_penalty: divides positive and multiplies negative logits of tokens among the last
      `repeat_last_n` written (Keskar et al. 2019, arXiv 1909.05858); 1 changes nothing. The prompt is
      not counted: a question's own words are needed in its answer.
    - presence_penalty, frequency_penalty: as in OpenAI's API, taken from the logits of tokens of the
      answer, however long ago they were written: once, and once for each time.
    - logit_bias: as in OpenAI's API, added to the model's own logits, before branches are combined. All
      tokens of a text get it. A token with -100 is never chosen while there is another.
    - seed: of the random numbers; None draws one from the system.
    """

    def __init__(self, settings: Settings = PLAIN, vocabulary: Vocabulary | None = None) -> None:
        """Begin an answer.

        Args:
            vocabulary: what tokens and texts of `logit_bias` mean; not needed without.

        Raises:
            SettingError: `logit_bias` names a token that there is not.
        """
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)
        self._recent: deque[int] = deque(maxlen=settings.repeat_last_n)
        self._written: Counter[int] = Counter()
        self._biased, self._biases = np.empty(0, np.int64), np.empty(0, np.float32)
        if settings.logit_bias and vocabulary is not None:
            self._biased, self._biases = token_biases(settings.logit_bias, vocabulary)
        self._banned = self._biased[self._biases <= _BAN]

    def bias(self, logits: Float32Array) -> None:
        """Add the biases of tokens to (B, V) logits of all branches, in place.

        Coefficients sum to 1, so that this adds them to the combination and to what judges plausibility.
        """
        if len(self._biased):
            logits[:, self._biased] += self._biases
            logits[:, self._banned] = _BANNED

    def sample(self, logits: Float32Array) -> int:
        """Choose a token and remember it for the repetition penalty.

        Args:
            logits: (V,) float32, contiguous, no NaN, masked tokens -inf, at least one finite.
                Penalties are applied in place.
        """
        chosen = self._settings
        if chosen.repeat_penalty != 1.0 and self._recent:
            penalize(logits, np.unique(np.array(self._recent, np.int64)), chosen.repeat_penalty)
        if chosen.presence_penalty or chosen.frequency_penalty:
            penalize_counts(logits, self._written, chosen.presence_penalty, chosen.frequency_penalty)
        if chosen.temperature == 0.0:
            token = argmax(logits)
        else:
            floor = math.log(chosen.min_p) if chosen.min_p > 0 else -math.inf
            scale = min(1.0 / chosen.temperature, _MAX_SCALE)
            uniform = self._random.random()
            token = _draw(logits, scale, chosen.top_k, chosen.top_p, floor, uniform)
        self._recent.append(token)
        self._written[token] += 1
        return token


def penalize(logits: Float32Array, tokens: npt.NDArray[np.int64], penalty: float) -> None:
    """Apply the repetition penalty to distinct `tokens` of (V,) `logits`, in place."""
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / penalty, values * penalty)


def penalize_counts(
    logits: Float32Array, counts: Mapping[int, int], presence: float, frequency: float
) -> None:
    """Take `presence + count * frequency` from the logits of counted tokens, in place."""
    tokens = np.fromiter(counts.keys(), np.int64, len(counts))
    logits[tokens] -= presence + frequency * np.fromiter(counts.values(), np.float32, len(counts))


def token_biases(
    biases: Iterable[tuple[int | str, float]], vocabulary: Vocabulary
) -> tuple[npt.NDArray[np.int64], Float32Array]:
    """Return distinct tokens, (n,) int64, and what to add to their logits, (n,) float32.

    Raises:
        SettingError: there is no token of an id.
    """
    sums: dict[int, float] = {}
    for token, number in biases:
        if isinstance(token, int) and not 0 <= token < vocabulary.n_vocab:
            message = f"logit_bias: there is no token {token}; the model has {vocabulary.n_vocab}"
            raise SettingError(message, "logit_bias")
        for each in {token} if isinstance(token, int) else set(vocabulary.tokenize(token).tolist()):
            sums[each] = sums.get(each, 0.0) + number
    return np.array(list(sums), np.int64), np.array(list(sums.values()), np.float32)


@kernel()
def forbid(logits: Float32Array, allowed: npt.NDArray[np.int32]) -> None:
    """Rule out tokens in (N, V) logits, in place, before they are combined.

    Coefficients sum to 1, so that the combination rules them out, too, and what judges plausibility.

    Args:
        allowed: (ceil(V / 32),) a bit for each token, the lowest first.
    """
    for row in range(logits.shape[0]):
        values = logits[row]
        for word in range(allowed.size):
            bits = allowed[word]
            block = values[word * 32 : word * 32 + 32]
            if bits == 0:
                block[:] = np.float32(FORBIDDEN)
            elif bits != -1:
                for v in range(block.size):
                    if not (bits >> np.int32(v)) & np.int32(1):
                        block[v] = np.float32(FORBIDDEN)


@kernel(fastmath={"reassoc", "contract", "nsz"})
def exp_below(values: Float32Array, peak: np.float32, scale: float, out: Float32Array) -> float:
    """out = exp((values - peak) * scale) for values <= peak; return its sum in float64.

    LLVM has no vector exp, so: 2^y = 2^n 2^f with n the nearest integer, 2^f by its Taylor series
    (|f| <= 1/2), 2^n by writing the exponent bits. Below 2^-126 it is 0. Three roundings of
    an exponent of up to 88 leave a relative error below 3 * 88 * 2^-24 + 1e-6 < 2e-5.
    """
    log2e = np.float32(scale * 1.4426950408889634)
    bits = np.empty(values.size, np.int32)
    power = bits.view(np.float32)
    for v in range(values.size):
        y = (values[v] - peak) * log2e
        y = y if y > np.float32(-126.0) else np.float32(-127.0)
        n = np.floor(y + np.float32(0.5))
        f = y - n
        series = np.float32(1.5403530e-4)
        series = series * f + np.float32(1.3333558e-3)
        series = series * f + np.float32(9.6181291e-3)
        series = series * f + np.float32(5.5504109e-2)
        series = series * f + np.float32(2.4022651e-1)
        series = series * f + np.float32(6.9314718e-1)
        out[v] = series * f + np.float32(1.0)
        bits[v] = (np.int32(n) + np.int32(127)) << np.int32(23)
    total = 0.0
    for v in range(values.size):
        out[v] *= power[v]
        total += out[v]
    return total


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
def _gather(logits: Float32Array, floor: np.float32, found: npt.NDArray[np.int32]) -> int:
    """Write the indices of logits >= floor into `found`, ascending; return how many they are."""
    if floor == 0.0:
        floor = np.float32(-0.0)  # equal, but with a smaller key: a block of -0.0 is not passed over
    floor_key = largest_key(np.array([floor], np.float32))
    count = 0
    for start in range(0, logits.size, BLOCK):
        block = logits[start : start + BLOCK]
        if largest_key(block) >= floor_key:
            for v in range(block.size):
                if block[v] >= floor:
                    found[count] = start + v
                    count += 1
    return count


@kernel()
def _draw(
    logits: Float32Array, scale: float, top_k: int, top_p: float, log_min_p: float, uniform: float
) -> int:
    """Return a token of the filtered distribution by inversion; `uniform` is in [0, 1)."""
    n_vocab = logits.size
    peak = logits[argmax(logits)]
    weights = np.empty(BLOCK, np.float32)

    # Find the candidates: all those within a window below the peak, which holds what top-k and top-p
    # keep. Widening it until it does costs less than sorting the vocabulary, and is as exact.
    candidates = np.empty(n_vocab, np.int32)
    total = 0.0
    if top_p < 1.0 and top_k == 0:
        for start in range(0, n_vocab, BLOCK):
            total += exp_below(logits[start : start + BLOCK], peak, 1.0, weights)
    sorting = top_k > 0 or top_p < 1.0
    window = _FIRST_WINDOW if sorting else -log_min_p
    while True:
        n = _gather(logits, max(np.float32(peak - window), _LOWEST), candidates)
        if not sorting or window == np.inf:
            break
        if top_k > 0:
            if n >= top_k:
                break
        else:
            mass = 0.0
            for i in range(n):
                mass += np.exp(np.float64(logits[candidates[i]] - peak))
            if mass >= top_p * total:
                break
        window = window * 2 if window < 64 else np.inf

    if sorting:
        order = np.argsort(-logits[candidates[:n]], kind="mergesort")  # stable: ties by index
        candidates = candidates[:n][order]
        if top_k > 0:
            n = min(n, top_k)
        if top_p < 1.0:
            if top_k > 0:  # what top-k kept is the whole now
                total = 0.0
                for i in range(n):
                    total += np.exp(np.float64(logits[candidates[i]] - peak))
            mass = 0.0
            for i in range(n):
                mass += np.exp(np.float64(logits[candidates[i]] - peak))
                if mass >= top_p * total:
                    n = i + 1
                    break
        floor = np.float32(peak + log_min_p)
        while logits[candidates[n - 1]] < floor:
            n -= 1

    # Invert the cumulative distribution, whole blocks first.
    kept = logits[candidates[:n]]
    sums = np.empty((n + BLOCK - 1) // BLOCK, np.float64)
    for i in range(sums.size):
        sums[i] = exp_below(kept[i * BLOCK : (i + 1) * BLOCK], peak, scale, weights)
    target = uniform * sums.sum()
    i = 0
    while i < sums.size - 1 and target >= sums[i]:
        target -= sums[i]
        i += 1
    block = kept[i * BLOCK : (i + 1) * BLOCK]
    exp_below(block, peak, scale, weights)
    chosen = 0
    for v in range(block.size):
        if weights[v] > 0:
            chosen = v
            if target < weights[v]:
                break
            target -= weights[v]
    return int(candidates[i * BLOCK + chosen])
