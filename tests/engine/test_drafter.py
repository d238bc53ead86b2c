"""A smaller model that drafts for a larger one: what it guesses, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_types import Load, MakeContext, Tiny

from amulet_gguf import Amulet, Answer, EngineError, SettingError
from amulet_gguf.engine.drafter import Drafter, check_vocabulary
from amulet_gguf.engine.generation import Generation
from amulet_gguf.engine.request import Request
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

PROMPT = np.array([5, 6, 7, 8, 9], np.int32)
QUESTION = "What do the people of the old house by the sea read?"


@pytest.fixture
def context(tiny_model: Model, make_context: MakeContext) -> Context:
    return make_context(tiny_model, 1, n_ctx=256, n_batch=16)


def greedy(model: Model, text: list[int], n: int, make_context: MakeContext) -> list[int]:
    """What the model writes, one token at a time in a context of its own."""
    context, found = make_context(model, 1, n_ctx=256), []
    pending = np.array(text, np.int32)
    for _ in range(n):
        context.add(0, pending, output=True)
        found.append(int(context.decode()[0].argmax()))
        pending = np.array(found[-1:], np.int32)
    return found


def test_it_guesses_what_its_model_would_write(
    tiny_model: Model, context: Context, make_context: MakeContext
) -> None:
    """From the beginning, after some were accepted, after all were wrong, and for another prompt."""
    drafter = Drafter(context, tiny_model.n_vocab)
    written: list[int] = []
    for accepted in (3, 0, 5, 1):
        guesses = drafter.propose(PROMPT, written, 5)
        assert guesses == greedy(tiny_model, [*PROMPT, *written], 5, make_context)
        written += [*guesses[:accepted], 11]
    other = PROMPT[::-1].copy()
    assert drafter.propose(other, [], 4) == greedy(tiny_model, other.tolist(), 4, make_context)
    assert drafter.seconds_each > 0


def test_a_long_prompt_is_read_a_batch_at_a_time(
    tiny_model: Model, context: Context, make_context: MakeContext
) -> None:
    drafter = Drafter(context, tiny_model.n_vocab)
    long = np.arange(10, 60, dtype=np.int32)
    assert [drafter.propose(long, [], 2) for _ in range(3)] == [[], [], []]
    assert drafter.propose(long, [], 2) == greedy(tiny_model, long.tolist(), 2, make_context)
    assert drafter.propose(np.arange(10, 250, dtype=np.int32), list(range(20)), 2) == []  # no room


def test_tokens_that_only_the_small_model_has_are_not_guessed(
    tiny_model: Model, context: Context, make_context: MakeContext
) -> None:
    first, second = greedy(tiny_model, PROMPT.tolist(), 2, make_context)
    assert Drafter(context, first).propose(PROMPT, [], 3) == []
    if second > first:
        assert Drafter(context, second).propose(PROMPT, [], 3) == [first]


@pytest.mark.parametrize("error", [EngineError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 2])
def test_a_failure_is_forgotten(
    tiny_model: Model,
    context: Context,
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    at: int,
) -> None:
    drafter = Drafter(context, tiny_model.n_vocab)
    decode, n_decoded = context.decode, 0

    def fail() -> Any:
        nonlocal n_decoded
        n_decoded += 1
        if n_decoded > at:
            raise error
        return decode()

    monkeypatch.setattr(context, "decode", fail)
    if isinstance(error, EngineError):
        assert drafter.propose(PROMPT, [], 4) == []
    else:
        with pytest.raises(KeyboardInterrupt):
            drafter.propose(PROMPT, [], 4)
    monkeypatch.setattr(context, "decode", decode)
    assert drafter.propose(PROMPT, [], 4) == greedy(tiny_model, PROMPT.tolist(), 4, make_context)


# In a generation


@pytest.fixture(scope="module")
def drafted(tiny: Tiny) -> Iterator[Amulet]:
    with Amulet.load(tiny("llama"), n_ctx=512, draft_model=tiny("llama")) as amulet:
        yield amulet


def write(amulet: Amulet, settings: Settings) -> tuple[Answer, Generation]:
    generations: list[Generation] = []
    submit = amulet.engine.submit

    def plan(planner: Planner, resolved: Settings) -> Request:
        return planner.request(QUESTION, None, resolved, is_adjustable=True)

    def note(request: Request) -> Generation:
        generations.append(submit(request))
        return generations[-1]

    amulet.engine.submit = note  # type: ignore[method-assign]
    try:
        return amulet.start(plan, settings, is_adjustable=True).answer(), generations[0]
    finally:
        del amulet.engine.submit


@pytest.mark.parametrize(
    "options",
    [
        {"strength": 1},
        {"strength": 3},
        {"strength": 3, "temperature": 1.0, "seed": 4},
        {"strength": 6, "fade": 5, "fade_to": 1},
    ],
)
def test_answers_are_the_same_with_it(drafted: Amulet, tiny: Tiny, options: dict[str, Any]) -> None:
    settings = Settings(prefer="concise", max_tokens=60, repeat_penalty=1, **options)
    with Amulet.load(tiny("llama"), n_ctx=512) as alone:
        expected, plain = write(alone, settings)
    answer, generation = write(drafted, settings)
    assert [p.token for p in answer.pieces] == [p.token for p in expected.pieces]
    assert plain.n_guessed == 0
    if options["strength"] == 1:  # the model itself drafts
        assert generation.n_right == generation.n_guessed > 0


def test_a_model_of_another_vocabulary_or_kind_is_refused(
    tiny: Tiny, load: Load, real_model: Path
) -> None:
    check_vocabulary(load("llama"), load("mamba"))
    with pytest.raises(SettingError, match=r"cannot draft for llama\.gguf: their vocabularies differ"):
        Amulet.load(tiny("llama"), n_ctx=256, draft_model=real_model)
    with pytest.raises(SettingError, match="cannot take tokens back") as caught:
        Amulet.load(tiny("llama"), n_ctx=256, draft_model=tiny("mamba"))
    assert caught.value.field == "draft_model"
