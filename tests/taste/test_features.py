"""Features of answers: against reading each answer token by token under the prompt of a request."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import numpy as np
import pytest
from fixture_types import MakeContext

from amulet_gguf.amulet import Amulet
from amulet_gguf.errors import PromptError
from amulet_gguf.llama.loading import Loading
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Float64Array
from amulet_gguf.preferences import PRESETS
from amulet_gguf.settings import Settings
from amulet_gguf.taste.features import MAX_TOKENS, log_ratios
from amulet_gguf.taste.learning import MAX_RATIO

MESSAGES = [
    {"role": "user", "content": "What is rain?"},
    {"role": "assistant", "content": "Water that falls."},
    {"role": "user", "content": "And snow?"},
]
ATTRIBUTES = [PRESETS["formal"], PRESETS["concise"], "Answer like an old sailor."]
ANSWERS = ["Snow falls, cold and white.", "", "rain " * 200]
T = TypeVar("T")


@pytest.fixture
def amulet(tiny_model: Model) -> Amulet:
    return Amulet.of(tiny_model, Loading(n_ctx=512, n_threads=1), 2)


def whole(reading: Generator[tuple[int, int], None, T]) -> tuple[T, list[tuple[int, int]]]:
    told = []
    while True:
        try:
            told.append(next(reading))
        except StopIteration as done:  # noqa: PERF203
            return done.value, told


def test_features_are_clipped_means_of_log_ratios(amulet: Amulet, make_context: MakeContext) -> None:
    context = make_context(amulet.model, 1, n_ctx=512)

    def log_likelihood(prefer: str | None, answer: str) -> Float64Array:
        settings = Settings(prefer=prefer, strength=float(prefer is not None))
        context.clear()
        inputs, found = amulet.planner.request(None, MESSAGES, settings).branches[0], []
        for token in amulet.model.tokenize(answer, special=False)[:MAX_TOKENS]:
            for start in range(0, len(inputs), 64):
                context.add(0, inputs[start : start + 64], output=True)
                row = context.decode()[0].astype(np.float64)
            found.append(row[token] - np.logaddexp.reduce(row))
            inputs = np.array([token], np.int32)
        return np.array(found)

    found, _ = whole(log_ratios(amulet, MESSAGES, ANSWERS, ATTRIBUTES))
    assert found.shape == (3, 3)
    for row, answer in enumerate(ANSWERS):
        for column, text in enumerate(ATTRIBUTES):
            if not answer:
                assert found[row, column] == 0
                continue
            ratios = log_likelihood(text, answer) - log_likelihood(None, answer)
            expected = ratios.clip(-MAX_RATIO, MAX_RATIO).mean()
            assert found[row, column] == pytest.approx(expected, abs=0.03)
    assert np.abs(found[[0, 2]]).min() > 0


def test_progress_is_told_batch_by_batch(amulet: Amulet) -> None:
    _, told = whole(log_ratios(amulet, MESSAGES, ANSWERS[:2], ATTRIBUTES))
    assert told == sorted(told)
    assert {total for _, total in told} == {8}
    assert {done for done, _ in told} <= set(range(8))


def test_the_engine_answers_as_before(amulet: Amulet) -> None:
    before = amulet.generate("What is rain?", max_tokens=8).text
    reading = log_ratios(amulet, MESSAGES, ANSWERS, ATTRIBUTES)
    next(reading)
    assert amulet.generate("What is rain?", max_tokens=8).text == before
    reading.close()  # given up in the middle
    assert amulet.generate("What is rain?", max_tokens=8).text == before


def test_messages_that_make_no_prompt_are_refused(amulet: Amulet) -> None:
    with pytest.raises(PromptError):
        next(log_ratios(amulet, [{"role": "user", "content": ""}], ANSWERS, ATTRIBUTES))
