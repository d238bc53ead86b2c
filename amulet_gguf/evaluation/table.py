"""Values of single answers become means with confidence intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from amulet_gguf.method.arrays import Float64Array

#: The preference of a result that is the mean over all of them.
ALL: Final = "all"
_RESAMPLES: Final = 2000
_EXPONENTIAL: Final = frozenset({"perplexity"})  # averaged as logarithms, shown as their exponential


@dataclass(frozen=True)
class Value:
    """One measure of one answer; NaN where it is not defined."""

    question: int
    method: str
    preference: str
    measure: str
    value: float


@dataclass(frozen=True)
class Result:
    """A mean over answers.

    Attributes:
        low, high: 95 % interval, by bootstrap over questions (Efron 1979); NaN with one question.
        n: answers that have the measure.
    """

    method: str
    preference: str
    measure: str
    value: float
    low: float
    high: float
    n: int


def tabulate(values: Sequence[Value], seed: int = 0) -> list[Result]:
    """Return a result per method, preference and measure, and per method and measure over `ALL`.

    Questions are resampled, not answers: answers to one question are no independent observations. The
    mean over all preferences is taken within each question first.
    """
    questions = {question: i for i, question in enumerate(sorted({v.question for v in values}))}
    preferences = list(dict.fromkeys(v.preference for v in values))
    cells: dict[tuple[str, str], dict[str, Float64Array]] = {}
    for value in values:
        by_preference = cells.setdefault((value.method, value.measure), {})
        row = by_preference.setdefault(value.preference, np.full(len(questions), math.nan))
        row[questions[value.question]] = value.value
    draws = np.random.default_rng(seed).integers(0, len(questions), (_RESAMPLES, len(questions)))
    results = []
    for (method, measure), by_preference in cells.items():
        for preference in (ALL, *preferences):
            if preference == ALL:
                table = np.array(list(by_preference.values()))
            elif preference in by_preference:
                table = by_preference[preference][None]
            else:
                continue
            results.append(_result(method, preference, measure, table, draws))
    return results


def _result(
    method: str,
    preference: str,
    measure: str,
    table: Float64Array,
    draws: np.ndarray[tuple[int, int]],
) -> Result:
    """Summarize a (preferences, questions) table of one measure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing but NaN are NaN
        per_question = np.nanmean(table, axis=0)
        mean = float(np.nanmean(per_question))
        low, high = math.nan, math.nan
        if np.isfinite(per_question).sum() > 1:
            means = np.nanmean(per_question[draws], axis=1)
            low, high = (float(x) for x in np.nanpercentile(means, [2.5, 97.5]))
    if measure in _EXPONENTIAL:
        mean, low, high = math.exp(mean), math.exp(low), math.exp(high)
    return Result(method, preference, measure, mean, low, high, int(np.isfinite(table).sum()))


def by_method(results: Sequence[Result], preference: str) -> Mapping[str, Mapping[str, Result]]:
    """Return results of one preference as method -> measure -> result."""
    table: dict[str, dict[str, Result]] = {}
    for result in results:
        if result.preference == preference:
            table.setdefault(result.method, {})[result.measure] = result
    return table
