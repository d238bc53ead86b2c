"""The engine: what a generation writes depends on itself alone, whatever happens around it."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from fakes import (
    END,
    POISON,
    Contexts,
    FakeContext,
    FakeVocabulary,
    alone,
    mixture,
    request,
    text_of,
)
from fixture_types import Load, MakeContext
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from amulet_gguf.engine import engine as engine_module
from amulet_gguf.engine import generation as generation_module
from amulet_gguf.engine import sequences as sequences_module
from amulet_gguf.engine.answer import Piece
from amulet_gguf.engine.drafts import Drafts, TextSource
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.generation import Generation
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import (
    AmuletError,
    ClosedError,
    EngineError,
    NonFiniteLogitsError,
    PromptTooLongError,
)
from amulet_gguf.llama import context as context_module
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Tokens
from amulet_gguf.method.mixture import Fade, Mixture
from amulet_gguf.method.sampling import Sampler

# Prompts after which answers are neither empty nor cut off at once.
PAIR = [[2, 4, 5], [2, 4, 5, 6]]
TRIO = [[5, 5, 2], [5, 5, 3], [5, 5, 4]]
LONG = [[4 + i % 7 for i in range(30)] + [end] for end in (2, 4, 6)]


@pytest.fixture(autouse=True)
def share_short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_module, "_MIN_SHARED", 3)


def start(n_sequences: int = 2, **sizes: Any) -> tuple[Engine, Contexts]:
    contexts = Contexts(**sizes)
    return Engine(FakeVocabulary(), contexts, n_sequences), contexts


def finish(engine: Engine, steps: int = 500) -> None:
    """Step until there is nothing to do."""
    for _ in range(steps):
        if not engine.step():
            return
    pytest.fail("the engine does not come to an end")


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token for piece in pieces if piece.token is not None]


def written(generation: Generation) -> tuple[list[int], str | None]:
    return tokens_of(list(generation.pieces)), generation.finish_reason


def assert_all_free(contexts: Contexts) -> None:
    assert contexts.current.held == [[]] * contexts.current.n_sequences


# One generation


@pytest.mark.parametrize("branches", [PAIR[:1], PAIR, TRIO, LONG], ids=["1", "2", "3", "chunked"])
@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("plausibility", [0.0, 0.3])
def test_a_generation_equals_an_independent_loop(
    branches: list[list[int]], seed: int | None, plausibility: float
) -> None:
    engine, contexts = start()
    asked = request(branches, seed=seed, plausibility=plausibility)
    pieces = list(engine.stream(engine.submit(asked)))
    tokens, reason = alone(asked, seed)
    assert tokens_of(pieces) == tokens
    assert "".join(piece.text for piece in pieces) == text_of(tokens)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reason]
    assert_all_free(contexts)


def test_changed_marks_the_tokens_that_ordinary_prompting_would_not_write() -> None:
    asked = request(PAIR, strength=5.0)
    engine, _ = start()
    pieces = list(engine.stream(engine.submit(asked)))
    tokens = tokens_of(pieces)
    prompted = []
    for at in range(len(tokens)):  # the preference alone, after what has been written
        one = request([PAIR[1] + tokens[:at]], max_tokens=1)
        prompted.append((alone(one)[0] or [END])[0])
    assert [p.changed for p in pieces if p.token is not None] == [
        token != other for token, other in zip(tokens, prompted, strict=True)
    ]
    assert 0 < sum(piece.changed for piece in pieces) < len(tokens)


def test_each_branch_gets_the_same_tokens() -> None:
    engine, contexts = start(3)
    generation = engine.submit(request(TRIO))
    while not generation.is_finished:
        engine.step()
        tokens = tokens_of(list(generation.pieces))
        if not generation.is_finished:
            assert contexts.current.held == [branch + tokens[:-1] for branch in TRIO]
    assert len(tokens) > 3


@pytest.mark.parametrize("shared", [0, 2, 3, 4, 11, 12, 13, 29])
def test_a_shared_prefix_is_read_once(shared: int) -> None:
    engine, contexts = start(3)
    prefix = [2 + i % 9 for i in range(shared)]
    branches = [[*prefix, 4, 5], [*prefix, 6], [*prefix, 7, 8, 9]]
    generation = engine.submit(request(branches, max_tokens=1))
    n_prefill = generation.n_prefill
    finish(engine)
    rows = sum(n for batch in contexts.current.batches for _, n in batch)
    assert rows == n_prefill == generation.n_read == 6 + (shared if shared >= 3 else 3 * shared)
    assert written(generation) == alone(request(branches, max_tokens=1))


def test_of_equal_branches_all_but_the_last_token_is_shared() -> None:
    engine, contexts = start(3)
    asked = request([[5] * 9] * 3, max_tokens=3)
    generation = engine.submit(asked)
    assert generation.n_prefill == 8 + 3
    finish(engine)
    assert written(generation) == alone(asked)
    assert contexts.current.batches[0] == [(0, 8)]


@pytest.mark.parametrize("n_batch", [3, 4, 5, 7, 12, 100])
def test_a_prompt_longer_than_a_batch_is_read_in_full_chunks(n_batch: int) -> None:
    engine, contexts = start(3, n_batch=n_batch)
    branches = [[4 + (i + b) % 7 for i in range(20 + b)] for b in range(3)]
    generation = engine.submit(request(branches))
    finish(engine)
    assert written(generation) == alone(request(branches))
    sizes = [sum(n for _, n in batch) for batch in contexts.current.batches]
    prefill = sizes[: len(sizes) - generation.n_tokens]
    assert max(sizes) <= n_batch
    assert len(prefill) <= -(-63 // n_batch) + 1  # the last step needs a row of each branch


def test_one_branch_longer_than_the_others_is_no_trouble() -> None:
    engine, _ = start(3, n_batch=4)
    branches = [[4], [5 + i % 4 for i in range(41)], [6, 7]]
    generation = engine.submit(request(branches))
    finish(engine)
    assert written(generation) == alone(request(branches))


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_tokens_ends_an_answer(limit: int) -> None:
    asked = request(PAIR, max_tokens=limit)
    engine, contexts = start()
    pieces = list(engine.stream(engine.submit(asked)))
    assert tokens_of(pieces) == alone(request(PAIR, max_tokens=100))[0][:limit]
    assert pieces[-1].finish_reason == "length"
    assert_all_free(contexts)


def test_text_held_back_for_a_stop_string_is_given_at_the_end() -> None:
    everything = text_of(alone(request(PAIR, max_tokens=6))[0])
    asked = request(PAIR, max_tokens=6, stop=[everything[-1] + "never"])
    engine, _ = start()
    pieces = list(engine.stream(engine.submit(asked)))
    assert "".join(piece.text for piece in pieces) == everything


def test_a_prompt_that_leaves_no_room_is_refused_before_decoding() -> None:
    engine, contexts = start(n_ctx=40)
    for size in (40, 41, 1000):
        with pytest.raises(PromptTooLongError) as caught:
            engine.submit(request([[4], [4] * size]))
        assert (caught.value.n_prompt, caught.value.n_ctx) == (size, 40)
    assert contexts.current.batches == []
    assert engine.step() is False


@pytest.mark.parametrize("size", [30, 38, 39])
def test_the_context_limit_ends_an_answer(size: int) -> None:
    engine, contexts = start(n_ctx=40)
    prompt = next(
        prompt
        for last in range(2, 12)
        if len(alone(request([prompt := [4] * (size - 1) + [last]], max_tokens=99), n_ctx=40)[0])
        == 41 - size
    )
    generation = engine.submit(request([prompt], max_tokens=99))
    finish(engine)
    assert written(generation) == alone(request([prompt], max_tokens=99), n_ctx=40)
    assert generation.finish_reason == "length"
    assert_all_free(contexts)


def test_on_step_sees_every_step_and_the_prompt_being_read() -> None:
    engine, contexts = start(3)
    generation = engine.submit(request(LONG))
    read: list[int] = []
    pieces = list(engine.stream(generation, lambda g: read.append(g.n_read)))
    assert len(read) == len(contexts.current.batches) > len(pieces)
    assert read == sorted(read)
    assert 0 < read[0] < read[-1] == generation.n_prefill


# Several generations


def test_holes_are_closed_and_results_stay_the_same() -> None:
    engine, contexts = start(5)
    first, second, third = (
        request(branches, max_tokens=15) for branches in (PAIR, PAIR[:1], PAIR[::-1])
    )
    one, two, three = map(engine.submit, (first, second, third))
    for _ in range(4):
        engine.step()
    assert three.first_sequence == 3
    engine.cancel(two)
    engine.step()
    assert one.first_sequence == 0
    assert three.first_sequence == 2
    finish(engine)
    assert written(one) == alone(first)
    assert written(three) == alone(third)
    assert_all_free(contexts)


def test_room_is_made_by_moving_generations_together() -> None:
    engine, contexts = start(4)
    asked = [request(PAIR[:1], max_tokens=n) for n in (3, 12, 3, 12)]
    generations = [engine.submit(each) for each in asked]
    wide = engine.submit(request(PAIR, max_tokens=5))  # fits only into the holes of first and third
    finish(engine)
    assert len(contexts.made) == 1
    for generation, each in zip(generations, asked, strict=True):
        assert written(generation) == alone(each)
    assert written(wide) == alone(request(PAIR, max_tokens=5))
    assert wide.started_at is not None
    assert generations[3].finished_at is not None
    assert wide.started_at < generations[3].finished_at


def test_a_generation_wider_than_the_context_waits_until_it_is_idle() -> None:
    engine, contexts = start(2)
    running = engine.submit(request(PAIR))
    engine.step()
    wide = engine.submit(request(TRIO))
    behind = engine.submit(request(PAIR, seed=5))
    while not running.is_finished:
        engine.step()
        assert len(contexts.made) == 1
        assert not wide.pieces
        assert not behind.pieces  # first come, first served
    finish(engine)
    assert [context.n_sequences for context in contexts.made] == [2, 3]
    assert written(running) == alone(request(PAIR))
    assert written(wide) == alone(request(TRIO))
    assert written(behind) == alone(request(PAIR, seed=5), 5)


def test_a_generation_too_wide_for_the_memory_fails_alone() -> None:
    engine, contexts = start(2, limit=2)
    before, wide, after = map(engine.submit, (request(PAIR), request(TRIO), request(PAIR, seed=1)))
    finish(engine)
    assert written(before) == alone(request(PAIR))
    assert isinstance(wide.error, EngineError)
    assert written(wide) == ([], None)
    assert written(after) == alone(request(PAIR, seed=1), 1)
    assert contexts.current.n_sequences == 2


def test_reserve_makes_room_only_while_idle() -> None:
    engine, contexts = start(2, limit=5)
    engine.reserve(1)
    assert len(contexts.made) == 1
    engine.reserve(5)
    assert contexts.current.n_sequences == 5
    with pytest.raises(EngineError, match="no memory"):
        engine.reserve(6)
    assert contexts.current.n_sequences == 5
    generation = engine.submit(request(PAIR))
    engine.step()
    with pytest.raises(EngineError, match="running"):
        engine.reserve(6)
    finish(engine)
    assert written(generation) == alone(request(PAIR))


def drafts_of(kind: str, answer: list[int], branches: list[list[int]]) -> Drafts | None:
    """Guesses of all qualities, which are made at every step: what they cost does not matter here."""
    texts = {
        "none": [],
        "right": answer,
        "half right": [token if i % 3 else 4 for i, token in enumerate(answer)],
        "at hand": [*branches[0], *answer[::-1]],
    }
    text = np.array(texts[kind], np.int32)
    return (
        Drafts(
            np.empty(0, np.int32), [TextSource("text", text, min_match=1, accepted=1.0, is_answer=True)]
        )
        if texts[kind]
        else None
    )


class Schedules(RuleBasedStateMachine):
    """Generations come, go and fail in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts = Contexts(n_ctx=40, n_batch=9)
        self.engine = Engine(FakeVocabulary(), self.contexts, 2)
        self.runs: list[tuple[Generation, Request, int | None]] = []
        self.turns: dict[Generation, list[tuple[int, Mixture]]] = {}

    @rule(
        prefix=st.lists(st.integers(2, 11), max_size=25),
        ends=st.lists(st.lists(st.integers(2, 11), min_size=1, max_size=15), min_size=1, max_size=4),
        max_tokens=st.integers(1, 25),
        plausibility=st.sampled_from([0.0, 0.5]),
        seed=st.none() | st.integers(0, 3),
        kind=st.sampled_from(["plain"] * 6 + ["poisoned", "too wide"]),
        guesses=st.sampled_from(["none", "right", "half right", "at hand"]),
    )
    def submit(
        self,
        prefix: list[int],
        ends: list[list[int]],
        max_tokens: int,
        plausibility: float,
        seed: int | None,
        kind: str,
        guesses: str,
    ) -> None:
        branches = [prefix + end for end in ends]
        if kind == "poisoned":
            branches[-1][-1] = POISON
        if kind == "too wide":
            branches = (branches * 9)[:9]
        asked = request(branches, max_tokens=max_tokens, plausibility=plausibility, seed=seed)
        if kind == "plain" and max(map(len, branches)) < 40:
            asked = replace(asked, drafts=drafts_of(guesses, alone(asked, seed, n_ctx=40)[0], branches))
        try:
            generation = self.engine.submit(asked)
        except PromptTooLongError:
            assert max(map(len, branches)) >= 40
        else:
            assert max(map(len, branches)) < 40
            self.runs.append((generation, asked, seed))
            self.turns[generation] = []

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @rule(
        which=st.integers(0, 100),
        strength=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        plausibility=st.sampled_from([0.0, 0.5]),
    )
    def turn_the_dial(self, which: int, strength: float, plausibility: float) -> None:
        if self.runs:
            generation, _, _ = self.runs[which % len(self.runs)]
            if generation.is_finished:
                return
            generation.mixture = mixture(generation.n_branches, strength, plausibility)
            self.turns[generation].append((generation.n_tokens, generation.mixture))

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.runs:
            self.engine.cancel(self.runs[which % len(self.runs)][0])

    @rule(error=st.sampled_from([EngineError("no room"), KeyboardInterrupt()]))
    def fail_decode(self, error: BaseException) -> None:
        decodes = len(self.contexts.current.batches)
        context = self.contexts.current
        context.error = error
        try:
            self.engine.step()
        except KeyboardInterrupt:
            assert isinstance(error, KeyboardInterrupt)
        if context.is_closed:
            self.contexts.current.error = None
        elif len(context.batches) > decodes:
            assert self.engine.n_live == 0
            assert_all_free(self.contexts)
        context.error = None

    @invariant()
    def what_was_written_is_right(self) -> None:
        for generation, asked, seed in self.runs:
            tokens, _reason = written(generation)
            if len(asked.branches) > 8:
                assert tokens == []
                assert generation.finish_reason in (None, "cancelled")
                continue
            if POISON in [branch[-1] for branch in asked.branches]:  # unless it never was needed
                if self.turns[generation]:
                    continue
                assert tokens == []
                assert generation.finish_reason in (None, "cancelled")
                continue
            turns = self.turns[generation]
            expected, expected_reason = alone(asked, seed, n_ctx=40, turns=turns)
            assert tokens == expected[: len(tokens)]
            if generation.finish_reason in ("stop", "length"):
                assert (tokens, generation.finish_reason) == (expected, expected_reason)

    @invariant()
    def only_live_generations_hold_sequences(self) -> None:
        held = self.contexts.current.held
        live = [run for run, _, _ in self.runs if run.first_sequence >= 0 and not run.is_finished]
        owned = [sequence for generation in live for sequence in generation.sequences]
        assert len(live) == self.engine.n_live
        assert len(set(owned)) == len(owned)
        assert all(not tokens for at, tokens in enumerate(held) if at not in owned)

    def teardown(self) -> None:
        finish(self.engine)
        self.what_was_written_is_right()
        assert all(generation.is_finished for generation, _, _ in self.runs)
        assert_all_free(self.contexts)


def test_no_schedule_changes_what_a_generation_writes() -> None:
    run_state_machine_as_test(
        Schedules, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )


# Branches that are not needed


def rows_of(contexts: Contexts) -> list[list[tuple[int, int]]]:
    batches = contexts.current.batches
    rows = list(batches)
    batches.clear()
    return rows


@pytest.mark.parametrize(("strength", "branch"), [(0.0, 0), (1.0, 1)])
def test_a_dial_at_either_end_decodes_one_row(strength: float, branch: int) -> None:
    engine, contexts = start()
    asked = request(PAIR, strength=strength)
    generation = engine.submit(asked)
    assert generation.n_prefill == len(PAIR[branch])
    finish(engine)
    assert written(generation) == alone(asked)
    prompt, *others = rows_of(contexts)
    assert prompt == [(branch, len(PAIR[branch]))]
    assert others
    assert all(rows == [(branch, 1)] for rows in others)


def test_a_dial_that_moves_back_costs_one_step_that_reads_all_that_was_missed() -> None:
    engine, contexts = start(n_batch=30)
    asked = request([[2, 9, 5], [7, 8, 6]], strength=1.0, max_tokens=30)
    generation = engine.submit(asked)
    for _ in range(5):
        engine.step()
    assert rows_of(contexts)[1:] == [[(1, 1)]] * 4
    generation.mixture = mixture(2, 3.0)
    engine.step()
    engine.step()
    assert rows_of(contexts) == [[(0, 3 + 5), (1, 1)], [(0, 1), (1, 1)]]
    finish(engine)
    assert written(generation) == alone(asked, turns=[(5, mixture(2, 3.0))])


def test_more_than_a_batch_that_was_missed_is_read_in_several_steps() -> None:
    engine, contexts = start(n_batch=6)
    asked = request([[2, 9, 5], [7, 8, 6]], strength=1.0, max_tokens=30)
    generation = engine.submit(asked)
    for _ in range(9):
        engine.step()
    n = generation.n_tokens
    assert n == 9
    rows_of(contexts)
    generation.mixture = mixture(2, 3.0)
    while generation.n_tokens == n:
        engine.step()
    assert rows_of(contexts) == [[(0, 6)], [(0, 5)], [(0, 1), (1, 1)]]
    finish(engine)
    assert written(generation) == alone(asked, turns=[(n, mixture(2, 3.0))])


def test_a_branch_that_catches_up_does_not_hold_up_others() -> None:
    engine, _ = start(4, n_batch=8)
    old = engine.submit(request([[2, 9, 5], [7, 8, 6]], strength=1.0, max_tokens=60))
    while old.n_tokens < 25 and not old.is_finished:
        engine.step()
    assert not old.is_finished
    young = engine.submit(request(PAIR, max_tokens=30))
    while young.n_tokens == 0:
        engine.step()
    n_old, n_young = old.n_tokens, young.n_tokens
    old.mixture = mixture(2, 3.0)
    for _ in range(3):  # it has 28 tokens and more to read, and gets half a batch
        engine.step()
    assert old.n_tokens == n_old
    assert young.n_tokens == n_young + 3 or young.is_finished
    finish(engine)
    assert old.n_tokens > n_old


def test_what_is_left_to_read_follows_a_dial_that_moves_meanwhile() -> None:
    engine, _ = start(n_batch=6)
    generation = engine.submit(request([[4 + i % 7 for i in range(20)], [5] * 30], strength=1.0))
    engine.step()
    assert generation.n_prefill == 30
    generation.mixture = mixture(2, 3.0)
    engine.step()
    assert generation.n_prefill == 50
    while generation.n_tokens == 0:
        engine.step()
    assert generation.n_read == generation.n_prefill == 50


def test_a_request_may_be_submitted_twice() -> None:
    engine, _ = start(5)
    fading = Mixture([-2.0, 3.0], [0.0, 1.0], fade=Fade(3.0, 0.0, 3.0), at=lambda s: [1 - s, s])
    asked = replace(request(PAIR, max_tokens=9), mixture=fading)
    first = engine.submit(asked)
    finish(engine)
    again = engine.submit(asked)
    finish(engine)
    assert written(first) == written(again)


def test_a_preference_of_weight_0_is_read_when_it_is_raised() -> None:
    engine, contexts = start(3)
    asked = request([[2, 9, 5], [7, 8, 6], [4, 4, 10]], max_tokens=30)
    asked = replace(asked, mixture=Mixture([-2.0, 3.0, 0.0], [0.0, 1.0, 0.0]))
    generation = engine.submit(asked)
    for _ in range(4):
        engine.step()
    assert {sequence for rows in rows_of(contexts) for sequence, _ in rows} == {0, 1}
    raised = Mixture([-2.0, 1.5, 1.5], [0.0, 0.5, 0.5])
    generation.mixture = raised
    finish(engine)
    assert written(generation) == alone(asked, turns=[(4, raised)])


def test_where_the_strength_has_faded_to_1_the_base_is_read_no_more() -> None:
    engine, contexts = start()
    fade = Fade(3.0, 1.0, 2.0)
    fading = Mixture([-2.0, 3.0], [0.0, 1.0], 0.3, fade=fade, at=lambda s: [1 - s, s])
    generation = engine.submit(replace(request(PAIR, max_tokens=18), mixture=fading))
    finish(engine)
    n = next(t for t in range(99) if fade.at(t) == 1)
    assert 5 < n < generation.n_tokens
    rows = rows_of(contexts)[-generation.n_tokens :]
    assert [len(each) for each in rows[1:]] == [2] * (n - 1) + [1] * (len(rows) - n)


def test_branches_left_behind_between_others_read_along() -> None:
    # A gap between rows costs a pass over the weights more than the row does: the fake refuses it.
    engine, contexts = start(6)
    asked = [request(each, strength=1.0, max_tokens=8, seed=i) for i, each in enumerate([PAIR, TRIO])]
    generations = [engine.submit(each) for each in asked]
    finish(engine)
    for seed, (generation, each) in enumerate(zip(generations, asked, strict=True)):
        assert written(generation) == alone(each, seed)
    assert [(1, 1), (2, 1), (3, 1), (4, 1)] in rows_of(contexts)


def test_a_step_under_way_has_the_mixture_that_it_began_with() -> None:
    engine, contexts = start()
    asked = request(PAIR, strength=1.0, max_tokens=12)
    generation = engine.submit(asked)
    engine.step()
    decode = contexts.current.decode

    def turn_the_dial() -> Any:  # as another thread does
        generation.mixture = mixture(2, 3.0)
        contexts.current.decode = decode  # type: ignore[method-assign]
        return decode()

    contexts.current.decode = turn_the_dial  # type: ignore[method-assign]
    finish(engine)
    assert written(generation) == alone(asked, turns=[(2, mixture(2, 3.0))])


# Cancelling and closing


@pytest.mark.parametrize("steps", range(9))
def test_cancelling_frees_sequences_at_once_at_any_moment(steps: int) -> None:
    engine, contexts = start(5)
    other = engine.submit(request(PAIR))
    generation = engine.submit(request(LONG))
    for _ in range(steps):
        engine.step()
    engine.cancel(generation)
    engine.cancel(generation)
    assert generation.finish_reason == "cancelled"
    assert [piece.finish_reason for piece in generation.pieces].count("cancelled") == 1
    assert sum(map(bool, contexts.current.held)) == (0 if steps == 0 else 2)
    finish(engine)
    assert written(other) == alone(request(PAIR))
    assert tokens_of(list(generation.pieces)) == alone(request(LONG))[0][: generation.n_tokens]
    assert_all_free(contexts)


def test_cancelling_what_waits_lets_the_next_one_in() -> None:
    engine, contexts = start(2)
    running, waiting, last = (engine.submit(request(PAIR)), engine.submit(request(TRIO)), None)
    engine.step()
    engine.cancel(waiting)
    last = engine.submit(request(PAIR, seed=2))
    finish(engine)
    assert waiting.first_sequence == -1
    assert len(contexts.made) == 1
    assert written(running) == alone(request(PAIR))
    assert written(last) == alone(request(PAIR, seed=2), 2)


@pytest.mark.parametrize("taken", range(4))
def test_closing_the_iterator_cancels(taken: int) -> None:
    engine, contexts = start()
    generation = engine.submit(request(PAIR))
    stream = engine.stream(generation)
    for _ in range(taken):
        next(stream)
    stream.close()
    engine.cancel(generation)  # as a generator that was never started cannot
    assert generation.finish_reason == "cancelled"
    assert_all_free(contexts)
    assert engine.step() is False


def test_cancelling_from_another_hand_ends_the_stream_with_a_last_piece() -> None:
    engine, _ = start()
    generation = engine.submit(request(PAIR))
    stream = engine.stream(generation)
    first = next(stream)
    engine.cancel(generation)
    rest = list(stream)
    assert tokens_of([first, *rest]) == alone(request(PAIR))[0][:1]
    assert rest[-1].finish_reason == "cancelled"


def test_closing_fails_what_is_live_and_what_waits() -> None:
    engine, contexts = start(2)
    running, waiting = engine.submit(request(PAIR)), engine.submit(request(TRIO))
    streams = [engine.stream(running), engine.stream(waiting)]
    first = next(streams[0])
    engine.close()
    engine.close()
    assert contexts.current.is_closed
    assert first.token == alone(request(PAIR))[0][0]
    for stream in streams:
        with pytest.raises(ClosedError):
            list(stream)
    for call in (engine.step, lambda: engine.submit(request(PAIR)), lambda: engine.reserve(1)):
        with pytest.raises(ClosedError):
            call()
    engine.cancel(running)
    assert running.finish_reason is None


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_row_that_is_not_finite_fails_its_generation_alone(at: int) -> None:
    engine, contexts = start(6)
    poisoned = [[*branch, POISON] if branch is PAIR[-1] else branch for branch in PAIR]
    asked = [request(PAIR), request(PAIR, seed=6)]
    asked.insert(at, request(poisoned))
    generations = [engine.submit(each) for each in asked]
    finish(engine)
    bad = generations.pop(at)
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert written(bad) == ([], None)
    with pytest.raises(NonFiniteLogitsError):
        list(engine.stream(bad))
    asked.pop(at)
    for generation, each, seed in zip(generations, asked, [None, 6], strict=True):
        assert written(generation) == alone(each, seed)
    assert_all_free(contexts)


@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("error", [EngineError("no room"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_decode_ends_all_that_are_live_and_no_more(steps: int, error: BaseException) -> None:
    engine, contexts = start(5)
    live = [engine.submit(request(PAIR)), engine.submit(request(LONG))]
    waiting = engine.submit(request(PAIR, seed=1))
    for _ in range(steps):
        engine.step()
    contexts.current.error = error
    if isinstance(error, AmuletError):
        assert engine.step()
    else:
        with pytest.raises(type(error)):
            engine.step()
    assert engine.n_live == 0
    assert_all_free(contexts)
    for generation in live:
        assert isinstance(generation.error, EngineError)
        with pytest.raises(EngineError):
            list(engine.stream(generation))
    finish(engine)
    assert written(waiting) == alone(request(PAIR, seed=1), 1)


def test_pieces_written_before_a_failure_are_not_lost() -> None:
    engine, contexts = start()
    generation = engine.submit(request(PAIR))
    for _ in range(4):
        engine.step()
    contexts.current.error = EngineError("no room")
    engine.step()
    pieces = []
    with pytest.raises(EngineError, match="no room"):  # noqa: PT012
        for piece in engine.stream(generation):
            pieces.append(piece)  # noqa: PERF402
    assert tokens_of(pieces) == alone(request(PAIR))[0][:4]


@contextmanager
def interrupt(files: Sequence[str], hit: Callable[[str, int], bool]) -> Iterator[None]:
    """Raise KeyboardInterrupt at the first line of `files`, about to be run, that is a hit."""
    is_done = False

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal is_done
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and not is_done and hit(frame.f_code.co_filename, frame.f_lineno):
            is_done = True
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def moments(files: Sequence[str], scenario: Callable[[], None]) -> list[int]:
    """Return when each line that a scenario runs is run for the first and for the last time."""
    lines: list[tuple[str, int]] = []

    def note(file: str, line: int) -> bool:
        lines.append((file, line))
        return False

    with interrupt(files, note):
        scenario()
    first = {line: at for at, line in reversed(list(enumerate(lines)))}
    last = {line: at for at, line in enumerate(lines)}
    return sorted({*first.values(), *last.values()})


def interrupted_at(files: Sequence[str], moment: int, scenario: Callable[[], None]) -> None:
    left = moment

    def count(_file: str, _line: int) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    with interrupt(files, count), pytest.raises(KeyboardInterrupt):
        scenario()


# Threads


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_threads_that_ask_while_one_steps_get_exactly_their_own_pieces() -> None:
    engine, contexts = start(5)
    asked = [request(PAIR, seed=seed) for seed in range(6)] + [request(TRIO, seed=9)]
    seeds = [*range(6), 9]
    results: dict[int, list[Piece]] = {}
    barrier = threading.Barrier(len(asked))
    is_over = threading.Event()

    def read(index: int) -> None:
        barrier.wait()
        generation = engine.submit(asked[index])
        pieces = results[index] = []
        is_finished = False
        while not is_finished:
            is_finished = generation.is_finished  # asked first: the last piece may come at any moment
            while generation.pieces:
                pieces.append(generation.pieces.popleft())
            old = generation.mixture
            generation.mixture = Mixture(old.coefficients, old.reference, 0.0)  # type: ignore[arg-type]
            if index % 3 == 2 and len(pieces) > 2:
                engine.cancel(generation)
            time.sleep(0.0001)

    def step() -> None:
        while not is_over.is_set():
            engine.step()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(asked))]
    stepper = threading.Thread(target=step)
    for thread in [stepper, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    is_over.set()
    stepper.join()
    for index, (each, seed) in enumerate(zip(asked, seeds, strict=True)):
        tokens, reason = alone(each, seed)
        got = tokens_of(results[index])
        assert all(piece.finish_reason is None for piece in results[index][:-1])
        if results[index][-1].finish_reason == "cancelled":
            assert index % 3 == 2
            assert 2 < len(got) <= len(tokens)
            assert got == tokens[: len(got)]
        else:
            assert (got, results[index][-1].finish_reason) == (tokens, reason)
    assert_all_free(contexts)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_second_thread_that_steps_is_refused_and_disturbs_nobody(steps: int) -> None:
    engine, contexts = start(5)
    mine, other = engine.submit(request(PAIR)), engine.submit(request(TRIO))
    engine.step()
    for _ in range(steps):
        engine.step()
    before = [list(tokens) for tokens in contexts.current.held], len(contexts.current.batches)
    refused = r"another thread makes the steps of this model \(MainThread\): use AmuletService to ask"
    with pytest.raises(EngineError, match=refused):
        elsewhere(engine.step)
    assert (contexts.current.held, len(contexts.current.batches)) == before
    assert engine.n_live == 2
    with pytest.raises(EngineError, match=refused):
        elsewhere(lambda: list(engine.stream(other)))
    assert other.finish_reason == "cancelled"
    assert engine.n_live == 1
    finish(engine)
    assert written(mine) == alone(request(PAIR))
    assert_all_free(contexts)


def test_a_thread_is_refused_at_once_in_the_middle_of_a_step() -> None:
    engine, contexts = start()
    generation = engine.submit(request(PAIR))
    is_decoding, may_go_on = threading.Event(), threading.Event()
    decode = contexts.current.decode

    def held_up() -> Any:
        is_decoding.set()
        may_go_on.wait()
        return decode()

    contexts.current.decode = held_up  # type: ignore[method-assign]
    stepper = threading.Thread(target=finish, args=(engine,), name="the first")
    stepper.start()
    is_decoding.wait()
    with pytest.raises(EngineError, match=r"\(the first\)"):
        engine.step()
    may_go_on.set()
    stepper.join()
    assert written(generation) == alone(request(PAIR))


def test_of_threads_that_step_first_at_once_one_may() -> None:
    for _ in range(50):
        engine, _contexts = start()
        outcomes: list[bool] = []
        barrier = threading.Barrier(4)

        def step(engine: Engine, outcomes: list[bool], barrier: threading.Barrier) -> None:
            barrier.wait()
            try:
                engine.step()
                outcomes.append(True)
            except EngineError:
                outcomes.append(False)
            barrier.wait()  # none ends before all have tried

        threads = [threading.Thread(target=step, args=(engine, outcomes, barrier)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [False, False, False, True]


def test_when_the_thread_that_steps_has_ended_another_takes_over() -> None:
    engine, contexts = start()
    generation = engine.submit(request(PAIR))
    elsewhere(engine.step)
    assert elsewhere(lambda: next(engine.stream(generation))).token == alone(request(PAIR))[0][0]
    again = engine.submit(request(TRIO))
    assert tokens_of(list(engine.stream(again))) == alone(request(TRIO))[0]
    with pytest.raises(EngineError, match="MainThread"):
        elsewhere(engine.step)
    assert_all_free(contexts)


@pytest.mark.parametrize("at", [0, 2])
def test_a_last_piece_from_another_thread_is_not_lost(at: int) -> None:
    """Another thread's `cancel` falls between the reader's look for pieces and for the end."""
    engine, contexts = start()
    asked = request(PAIR)
    generation = engine.submit(asked)
    looks = 0

    class Watched(deque[Piece]):
        def __len__(self) -> int:
            nonlocal looks
            length = super().__len__()
            if length == 0:
                looks += 1
                if looks == at + 1:
                    elsewhere(lambda: engine.cancel(generation))
            return length

        def __bool__(self) -> bool:  # Python 3.10's own does not ask for the length
            return len(self) > 0

    generation.pieces = Watched()
    pieces = list(engine.stream(generation))
    assert tokens_of(pieces) == alone(asked)[0][:at]
    assert [piece.finish_reason for piece in pieces] == [None] * at + ["cancelled"]
    assert_all_free(contexts)


# Real contexts


def prompts_of(model: Model, *texts: str) -> list[Tokens]:
    return [model.tokenize(text) for text in texts]


STORY = "the people of the old house by the sea were learning to read and write in the night. " * 3


def real_request(branches: Sequence[Tokens], max_tokens: int = 24) -> Request:
    plain = request([[0]] * len(branches), strength=2.0, max_tokens=max_tokens)
    mixture = Mixture(plain.mixture.coefficients, plain.mixture.reference, 0.1)  # type: ignore[arg-type]
    return Request(branches, mixture, Sampler(), max_tokens=max_tokens)


def read_alone(
    model: Model,
    make_context: MakeContext,
    asked: Request,
    turns: Sequence[tuple[int, Mixture]] = (),
) -> list[int]:
    """The tokens of a request by a loop in which each branch has a context of its own."""
    contexts = [make_context(model, 1, n_ctx=512, n_batch=512) for _ in asked.branches]
    branches = list(asked.branches)
    tokens: list[int] = []
    while len(tokens) < asked.max_tokens:
        rows = []
        for context, branch in zip(contexts, branches, strict=True):
            context.add(0, branch, output=True)
            rows.append(context.decode()[0].astype(np.float64))
        acting = [asked.mixture, *(each for first, each in turns if first <= len(tokens))][-1]
        mixed = np.array(acting.coefficients) @ rows
        judged = np.array(acting.reference) @ rows
        if min(acting.coefficients) < 0:
            mixed[judged < judged.max() + acting.margin] = -np.inf
        token = int(mixed.argmax())
        if model.ends_generation(token):
            break
        tokens.append(token)
        branches = [np.array([token], np.int32)] * len(branches)
    return tokens


def real_engine(model: Model, make_context: MakeContext, n_sequences: int, n_batch: int = 256) -> Engine:
    return Engine(model, lambda n: make_context(model, n, n_ctx=512, n_batch=n_batch), n_sequences)


def test_generations_at_once_write_what_independent_contexts_do(
    any_model: Model, make_context: MakeContext
) -> None:
    asked = [
        real_request(prompts_of(any_model, "tell a story", "tell a story about the sea")),
        real_request(prompts_of(any_model, "what is far", "give me the name", "at night")),
        real_request(prompts_of(any_model, "once")),
    ]
    engine = real_engine(any_model, make_context, 6)
    generations = [engine.submit(each) for each in asked]
    finish(engine)
    for generation, each in zip(generations, asked, strict=True):
        expected = read_alone(any_model, make_context, each)
        assert tokens_of(list(generation.pieces)) == expected
    assert sum(generation.n_tokens for generation in generations) > 24


def test_when_branches_caught_up_does_not_matter(any_model: Model, make_context: MakeContext) -> None:
    strengths = [1.0, 3.0, 0.0, 2.0, 1.0, 0.5]
    asked = real_request(prompts_of(any_model, STORY + "and", STORY + "give me"), max_tokens=60)
    turns = [(10 * i, mixture(2, strength, 0.1)) for i, strength in enumerate(strengths)]
    engine = real_engine(any_model, make_context, 2)
    generation = engine.submit(asked)
    for first, acting in turns:
        while generation.n_tokens < first and not generation.is_finished:
            engine.step()
        generation.mixture = acting
    finish(engine)
    assert generation.n_tokens > 30
    expected = read_alone(any_model, make_context, asked, turns)
    assert tokens_of(list(generation.pieces)) == expected


@pytest.mark.parametrize("n_batch", [32, 256])
def test_a_shared_prefix_gives_what_separate_reading_gives(
    any_model: Model, make_context: MakeContext, n_batch: int
) -> None:
    prompts = prompts_of(any_model, STORY + "and", STORY + "but not", STORY + "his")
    asked = real_request(prompts)
    engine = real_engine(any_model, make_context, 3, n_batch)
    generation = engine.submit(asked)
    assert generation.n_prefill < max(map(len, prompts)) + 20
    assert generation.n_prefill > 64  # so that it takes several batches of 32
    finish(engine)
    assert tokens_of(list(generation.pieces)) == read_alone(any_model, make_context, asked)


def test_a_model_that_computes_nan_is_refused(load: Load, make_context: MakeContext) -> None:
    model = load("corrupt_nan")
    engine = real_engine(model, make_context, 2)
    generation = engine.submit(real_request(prompts_of(model, "tell", "tell me")))
    with pytest.raises(NonFiniteLogitsError):
        list(engine.stream(generation))
    assert generation.n_tokens == 0
    assert engine.n_live == 0


def test_the_fake_refuses_what_the_real_context_refuses() -> None:
    """The fake is only worth something if it is as strict as what it stands for."""
    context = FakeContext(2, n_ctx=8, n_batch=4)
    one = np.array([4], np.int32)
    for sequence, n in ((2, 1), (0, 5), (0, 0)):
        with pytest.raises(AssertionError):
            context.add(sequence, np.full(n, 4, np.int32), output=True)
    context.add(1, one, output=True)
    misuse: Callable[[], object]
    for misuse in (
        lambda: context.add(0, one, output=True),
        lambda: context.copy(1, 0),
        lambda: context.free(1),
    ):
        with pytest.raises(AssertionError):
            misuse()


@pytest.mark.parametrize("at", range(12))
def test_a_stop_string_ends_an_answer_before_it(at: int) -> None:
    everything = text_of(alone(request(PAIR, max_tokens=40))[0])
    stop = everything[at : at + 2]
    asked = request(PAIR, max_tokens=40, stop=[stop])
    engine, contexts = start()
    pieces = list(engine.stream(engine.submit(asked)))
    assert "".join(piece.text for piece in pieces) == everything[: everything.find(stop)]
    assert pieces[-1].finish_reason == "stop"
    tokens = tokens_of(pieces)
    assert stop in text_of(tokens)
    assert stop not in text_of(tokens[:-1]).rstrip("\ufffd")
    assert_all_free(contexts)


def test_generations_at_once_write_what_each_writes_alone() -> None:
    asked = [request(PAIR), request(TRIO, seed=3), request(LONG, seed=4), request(PAIR[:1])]
    engine, contexts = start(9, limit=9)
    generations = [engine.submit(each) for each in asked]
    finish(engine)
    for generation, each, seed in zip(generations, asked, [None, 3, 4, None], strict=True):
        assert written(generation) == alone(each, seed)
    assert len(contexts.current.batches) < sum(generation.n_tokens for generation in generations)
    assert_all_free(contexts)


@pytest.mark.parametrize("moment", ["add", "decode"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("skip", range(4))
def test_a_stream_closed_in_the_middle_of_a_step_leaves_nothing_behind(
    moment: str, victim: int, skip: int
) -> None:
    """The garbage collector, or a signal handler, closes a stream wherever it happens to run."""
    engine, contexts = start(4)
    generations = [engine.submit(request(PAIR)), engine.submit(request(PAIR[::-1]))]
    streams = [engine.stream(generation) for generation in generations]
    for stream in streams:
        next(stream)
    del stream
    kept = generations[1 - victim]
    others = [streams.pop(1 - victim)]
    context = contexts.current
    original: Callable[..., Any] = getattr(context, moment)
    left = skip

    def collect(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        result = original(*arguments, **options)
        left -= 1
        if left < 0 and streams:
            streams.pop()  # the last reference
            gc.collect()
        return result

    setattr(context, moment, collect)
    finish(engine)
    assert not streams
    n = len(alone(request(PAIR if victim else PAIR[::-1]))[0])
    assert others
    assert kept.error is None
    assert kept.n_tokens == n
    assert_all_free(contexts)
    again = engine.submit(request(TRIO))
    finish(engine)
    assert written(again) == alone(request(TRIO))


def prepared() -> tuple[Engine, Any, list[Generation], Callable[[], None]]:
    asked = [request(PAIR), request(PAIR[:1], max_tokens=3), request(LONG[:2]), request(TRIO)]
    engine, contexts = start(2)
    generations = [engine.submit(each) for each in asked]

    def scenario() -> None:
        for _ in range(5):
            engine.step()
        engine.cancel(generations[0])
        engine.step()
        engine.cancel(generations[2])
        engine.step()
        engine.step()

    return engine, contexts, generations, scenario


FILES = [str(module.__file__) for module in (engine_module, generation_module, sequences_module)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "moment_of_interrupt" in metafunc.fixturenames:
        with mock.patch.object(generation_module, "_MIN_SHARED", 3):
            when = moments(FILES, prepared()[-1])
        metafunc.parametrize("moment_of_interrupt", when)


def test_an_interrupt_at_any_line_of_the_engine_leaves_it_usable(moment_of_interrupt: int) -> None:
    engine, contexts, generations, scenario = prepared()
    where: list[str] = []

    def noted() -> None:
        try:
            scenario()
        except KeyboardInterrupt:
            trace = sys.exc_info()[2]
            while trace is not None:
                where.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
                trace = trace.tb_next
            raise

    interrupted_at(FILES, moment_of_interrupt, noted)
    try:
        again = engine.submit(request(PAIR))
        finish(engine)
        assert written(again) == alone(request(PAIR))
        for generation, branches in zip(generations, [PAIR, PAIR[:1], LONG[:2], TRIO], strict=True):
            assert generation.is_finished  # else a reader in another thread would wait for ever
            n = 3 if branches == PAIR[:1] else 20
            tokens, reason = written(generation)
            assert tokens == alone(request(branches, max_tokens=n))[0][: len(tokens)]
            if reason in ("stop", "length"):
                assert (tokens, reason) == alone(request(branches, max_tokens=n))
        assert engine.n_live == 0
        assert_all_free(contexts)
    except BaseException:
        print("interrupted at", where[-3:])
        raise


def test_an_interrupt_at_any_line_of_the_context_leaves_the_engine_usable(
    tiny_model: Model, make_context: MakeContext
) -> None:
    asked = real_request(prompts_of(tiny_model, STORY + "and", STORY + "but not"), max_tokens=6)
    short = real_request(prompts_of(tiny_model, "an old man"), max_tokens=2)
    expected = read_alone(tiny_model, make_context, asked)
    # Not the log callback: ctypes swallows what it raises.
    code = [
        function.__code__
        for name, function in vars(context_module.Context).items()
        if inspect.isfunction(function)
    ]
    lines = {line for each in code for _, _, line in each.co_lines() if line is not None}

    def scenario(engine: Engine) -> None:
        engine.submit(asked)
        engine.submit(short)
        for _ in range(5):
            engine.step()

    seen: list[int] = []

    def note(_: str, line: int) -> bool:
        if line in lines:
            seen.append(line)
        return False

    engine = real_engine(tiny_model, make_context, 3)
    with interrupt([context_module.__file__], note):
        scenario(engine)
    first = {line: at for at, line in reversed(list(enumerate(seen)))}
    last = {line: at for at, line in enumerate(seen)}
    when = {*first.values(), *last.values()}
    assert len(when) > 60
    for moment in when:
        engine = real_engine(tiny_model, make_context, 3)
        left = iter(range(moment, -1, -1))
        with (
            interrupt([context_module.__file__], lambda _, line: line in lines and next(left) == 0),  # noqa: B023
            pytest.raises(KeyboardInterrupt),
        ):
            scenario(engine)
        finish(engine)
        pieces = list(engine.stream(engine.submit(asked)))
        assert tokens_of(pieces) == expected
        engine.close()


def test_generations_that_are_moved_write_on_unchanged(
    any_model: Model, make_context: MakeContext
) -> None:
    """As where nothing moved: rows of other batch shapes differ by rounding, which can flip a tie."""
    first = prompts_of(any_model, "tell a story", "tell a story about the sea")
    last = prompts_of(any_model, "what is far", "give me the name")

    def run(between: list[Tokens]) -> list[tuple[list[int], str | None]]:
        engine = real_engine(any_model, make_context, 5)
        one = engine.submit(real_request(first))
        short = engine.submit(real_request(between, max_tokens=2)) if between else None
        two = engine.submit(real_request(last))
        while short is not None and not short.is_finished:
            engine.step()
        before = two.first_sequence
        engine.step()
        assert two.first_sequence == 2
        assert before == (3 if between else -1)
        finish(engine)
        return [written(one), written(two)]

    assert run(prompts_of(any_model, "an old man")) == run([])


def test_an_interrupt_while_the_context_grows_leaves_a_context() -> None:
    engine, contexts = start(2)
    original = contexts.__call__

    class Interrupted:
        calls = 0

        def __call__(self, n: int) -> Any:
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return original(n)

    engine._sequences._make_context = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        engine.reserve(4)
    generation = engine.submit(request(PAIR))
    finish(engine)
    assert written(generation) == alone(request(PAIR))


def test_an_error_that_is_not_ours_while_growing_does_not_reach_other_readers() -> None:
    """MemoryError of another's wide request must fail that request, not whoever happens to step."""
    engine, contexts = start(2)
    original = contexts.__call__

    def make(n: int) -> Any:
        if n > 2:
            raise MemoryError
        return original(n)

    engine._sequences._make_context = make
    wide = engine.submit(request(TRIO))
    mine = engine.submit(request(PAIR))
    pieces = list(engine.stream(mine))
    assert tokens_of(pieces) == alone(request(PAIR))[0]
    assert wide.error is not None


def test_closing_from_within_on_step_ends_the_stream_with_closed_error() -> None:
    engine, _ = start()
    with pytest.raises(ClosedError):
        list(engine.stream(engine.submit(request(PAIR)), lambda _: engine.close()))


def test_nan_models_leave_neighbours_alone(load: Load, make_context: MakeContext) -> None:
    """With a real context: the row of a broken generation does not touch that of a sound one."""
    model = load("corrupt_nan")
    engine = real_engine(model, make_context, 4)
    first = engine.submit(real_request(prompts_of(model, "tell", "tell me")))
    second = engine.submit(real_request(prompts_of(model, "go", "go on")))
    finish(engine)
    assert first.error is not None
    assert second.error is not None
    assert first.error is not second.error


def test_a_generation_cancelled_in_the_middle_of_its_token_has_one_last_piece() -> None:
    """As a signal's handler or a destructor may do."""
    engine, _ = start()
    generation = engine.submit(request(PAIR))

    class Cancelling(FakeVocabulary):
        def token_bytes(self, token: int) -> bytes:
            if generation.n_tokens == 2:
                engine.cancel(generation)
            return super().token_bytes(token)

    engine._detokenizer = Cancelling()
    reasons = [piece.finish_reason for piece in engine.stream(generation)]
    assert reasons == [None, "cancelled"]
