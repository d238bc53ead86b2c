"""How probable a model finds texts that it did not write, whatever was read before."""

from __future__ import annotations

import numpy as np
import pytest
from fixture_types import MakeContext
from hypothesis import given, settings
from hypothesis import strategies as st

from amulet_gguf.engine.likelihood import Likelihood
from amulet_gguf.errors import EngineError, PromptTooLongError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model, lib
from amulet_gguf.method.arrays import Float64Array, Tokens

HISTORY = np.arange(10, 50, dtype=np.int32)


def one_by_one(context: Context, prompt: Tokens, answer: Tokens) -> Float64Array:
    context.clear()
    inputs, found = prompt, []
    for token in answer:
        context.add(0, inputs, output=True)
        row = context.decode()[0].astype(np.float64)
        found.append(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
        inputs = np.array([token], np.int32)
    return np.array(found)


tokens = st.lists(st.integers(3, 60), max_size=6)


def test_any_order_of_prompts_gives_the_same(any_model: Model, make_context: MakeContext) -> None:
    context = make_context(any_model, 1)
    likelihood = Likelihood(any_model, n_ctx=256, n_prompts=2, n_threads=1)

    @settings(deadline=None, max_examples=10)
    @given(st.lists(st.tuples(st.integers(0, 40), tokens, tokens), min_size=1, max_size=5))
    def check(asked: list[tuple[int, list[int], list[int]]]) -> None:
        for n_shared, tail, answered in asked:
            prompt = np.array([*HISTORY[:n_shared], *tail, 5], np.int32)
            answer = np.array(answered, np.int32)
            found = likelihood.log_likelihood(prompt, answer)
            np.testing.assert_allclose(found, one_by_one(context, prompt, answer), atol=0.05)
            row = likelihood.logits(prompt)
            context.clear()
            context.add(0, prompt, output=True)
            np.testing.assert_allclose(row, context.decode()[0], atol=0.05)

    with likelihood:
        check()


def test_what_does_not_fit_is_refused(tiny_model: Model) -> None:
    with Likelihood(tiny_model, n_ctx=256, n_prompts=1, n_threads=1) as likelihood:
        whole = np.full(200, 7, np.int32)
        assert len(likelihood.log_likelihood(whole, whole[:56])) == 56
        with pytest.raises(PromptTooLongError):
            likelihood.log_likelihood(whole, whole[:57])
        with pytest.raises(PromptTooLongError):
            likelihood.logits(np.full(257, 7, np.int32))


def test_a_failure_spoils_nothing_that_is_cached(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = np.array([9, 8, 7], np.int32)
    prompts = [np.array([*HISTORY[:n], 5], np.int32) for n in (30, 20, 35)]
    with Likelihood(tiny_model, n_ctx=256, n_prompts=2, n_threads=1) as likelihood:
        before = [likelihood.log_likelihood(prompt, answer) for prompt in prompts[:2]]
        with monkeypatch.context() as patch:
            patch.setattr(lib, "llama_decode", lambda *_: -1)
            with pytest.raises(EngineError, match="could not decode"):
                likelihood.log_likelihood(prompts[2], answer)
        for prompt, expected in zip(prompts, before, strict=False):
            for _ in range(2):
                found = likelihood.log_likelihood(prompt, answer)
                np.testing.assert_allclose(found, expected, atol=0.05)
