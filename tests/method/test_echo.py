"""The words of a preference, which are not amplified, against float64 arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from amulet_gguf.llama.model import Model
from amulet_gguf.method.echo import echo_tokens, inflections, withhold
from amulet_gguf.method.realign import combine
from amulet_gguf.method.sampling import log_sum
from amulet_gguf.preferences import PRESETS
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

Rows = npt.NDArray[np.float32]

COEFFICIENTS = np.array([-4.65, 5.65])
REFERENCE = np.array([0.0, 1.0])


def log_softmax(rows: Rows) -> npt.NDArray[np.float64]:
    rows64 = rows.astype(np.float64)
    rows64 -= rows64.max(axis=-1, keepdims=True)
    return np.asarray(rows64 - np.log(np.exp(rows64).sum(axis=-1, keepdims=True)))


def test_log_sum_is_that_of_float64() -> None:
    for v in (1, 2, 1023, 1024, 1025, 151_936):
        row = (np.random.default_rng(v).normal(size=v) * 5).astype(np.float32)
        expected = np.logaddexp.reduce(row.astype(np.float64))
        assert log_sum(row) == pytest.approx(expected, abs=1e-4)


def test_withheld_tokens_gain_nothing_over_prompting_and_others_stay() -> None:
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(2, 400)) * 3).astype(np.float32)
    logits[1] += 5  # a constant of a row must not matter
    tokens = np.array([3, 77, 399], np.int32)
    combined = combine(logits, COEFFICIENTS)
    found = combined.copy()
    withhold(logits, COEFFICIENTS, REFERENCE, tokens, found)
    others = np.setdiff1d(np.arange(400), tokens)
    np.testing.assert_array_equal(found[others], combined[others])
    r, p = log_softmax(logits)
    shift = COEFFICIENTS @ np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    exact = np.minimum(r + 5.65 * (p - r), p)[tokens]
    np.testing.assert_allclose(found[tokens] - shift, exact, atol=1e-3)


def test_masked_tokens_stay_masked() -> None:
    logits = np.array([[0, 1, 2], [5, 0, -9]], np.float32)
    out = combine(logits, COEFFICIENTS, plausibility=0.1)
    withhold(logits, COEFFICIENTS, REFERENCE, np.array([0, 2], np.int32), out)
    assert out[2] == -np.inf


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("creative", {"creative", "creatively", "creativity"}),
        ("concise", {"concise", "concisely", "conciseness"}),
        ("verbose", {"verbose", "verbosely", "verbosity"}),
        ("uplifting", {"uplifting", "uplift", "uplifted"}),
    ],
)
def test_inflections_of_the_presets_are_known(name: str, forms: set[str]) -> None:
    assert forms <= inflections(PRESETS[name])
    assert not {"as", "be"} & inflections(PRESETS[name])


def test_echo_tokens_begin_words_of_the_text(tiny_model: Model) -> None:
    tokens = echo_tokens(tiny_model, ["Write like a sailor."])
    assert tokens.dtype == np.int32
    assert (np.diff(tokens) > 0).all()
    forms = inflections("Write like a sailor.")
    for token in tokens:
        written = tiny_model.token_bytes(int(token)).decode().strip().lower()
        assert any(form.startswith(written) for form in forms)


@pytest.mark.parametrize("strength", [0, 0.5, 1])
def test_without_extrapolation_there_is_nothing_to_withhold(tiny_model: Model, strength: float) -> None:
    settings = Settings(prefer="concise", strength=strength)
    request = Planner(tiny_model).request("Why?", None, settings)
    assert request.mixture.withheld is None
