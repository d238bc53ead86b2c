"""What sequences hold is reused, and changes nothing but the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes import Contexts, FakeContext, FakeVocabulary, alone, request, text_of
from fixture_types import MakeContext
from hypothesis import given, settings
from hypothesis import strategies as st

from amulet_gguf.engine.drafts import Drafts, TextSource
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.generation import Generation
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import EngineError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Tokens
from amulet_gguf.method.explanation import Alternative
from amulet_gguf.method.mixture import Mixture
from amulet_gguf.method.sampling import Sampler

HISTORY = [4, 5, 6, 7, 8, 9, 10, 11] * 3  # longer than what is worth a copy
Tails = Sequence[Sequence[int]]


def engine_of(can_truncate: bool = True, n_ctx: int = 96) -> tuple[Engine, Contexts]:
    class Made(Contexts):
        def __call__(self, n_sequences: int) -> FakeContext:
            context = super().__call__(n_sequences)
            context.can_truncate = can_truncate
            return context

    contexts = Made(n_ctx=n_ctx)
    return Engine(FakeVocabulary(), contexts), contexts


def run(engine: Engine, asked: Request) -> tuple[list[int], Generation]:
    generation = engine.submit(asked)
    return [p.token for p in engine.stream(generation) if p.token is not None], generation


def held(contexts: Contexts) -> list[list[int]]:
    return contexts.current.held


tokens = st.lists(st.integers(4, 11), min_size=1, max_size=6)
branches = st.lists(tokens, min_size=1, max_size=3)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 24), branches, st.integers(1, 12), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_reuse_writes_what_reading_all_writes(
    asked: list[tuple[int, Tails, int, bool]], can_truncate: bool
) -> None:
    engine, _ = engine_of(can_truncate)
    for n_shared, tails, max_tokens, is_drafted in asked:
        prompts = [[*HISTORY[:n_shared], *tail] for tail in tails]
        one = request(prompts, reuse=True, max_tokens=max_tokens)
        expected = alone(one, n_ctx=96)[0]
        if is_drafted:  # some guesses right, some wrong: those must leave nothing cached
            text = np.array([token if i % 4 else 5 for i, token in enumerate(expected)], np.int32)
            one = replace(
                one,
                drafts=Drafts(
                    np.empty(0, np.int32),
                    [TextSource("text", text, min_match=1, accepted=1.0, is_answer=True)],
                ),
            )
        assert run(engine, one)[0] == expected


@settings(deadline=None)
@given(
    st.lists(st.tuples(branches, st.integers(0, 9), st.booleans()), min_size=2, max_size=6),
    st.booleans(),
)
def test_reuse_beside_others_and_after_cancellations(
    asked: list[tuple[Tails, int, bool]], can_truncate: bool
) -> None:
    engine, _ = engine_of(can_truncate)
    engine.reserve(5)
    requests = [request([[*HISTORY, *tail] for tail in tails], reuse=reuse) for tails, _, reuse in asked]
    generations = [engine.submit(one) for one in requests]
    for step in range(200):
        for generation, (_, cancelled_at, _) in zip(generations, asked, strict=True):
            if step == cancelled_at > 0:
                engine.cancel(generation)
        if not engine.step():
            break
    for one, generation in zip(requests, generations, strict=True):
        written = [piece.token for piece in generation.pieces if piece.token is not None]
        expected = alone(one, n_ctx=96)[0]
        is_cancelled = generation.finish_reason == "cancelled"
        assert written == (expected[: len(written)] if is_cancelled else expected)


@pytest.mark.parametrize("can_truncate", [True, False])
def test_a_turn_reads_only_what_is_new(can_truncate: bool) -> None:
    engine, contexts = engine_of(can_truncate)
    first = request([HISTORY, [*HISTORY, 4, 4]], reuse=True, max_tokens=4)
    run(engine, first)
    kept = held(contexts)[0]
    assert kept[: len(HISTORY)] == HISTORY
    new = [9, 9, 9, 9]
    second = request([[*kept, *new, 4], [*kept, *new, 5, 5]], reuse=True)
    _, generation = run(engine, second)
    assert generation.n_prefill == generation.n_read == len(new) + 1 + 2


def test_other_preferences_read_only_the_tail() -> None:
    engine, contexts = engine_of()
    run(engine, request([[*HISTORY, 4], [*HISTORY, 5, 5]], reuse=True, max_tokens=4))
    _, generation = run(engine, request([[*HISTORY, 4], [*HISTORY, 6, 6, 6]], reuse=True))
    assert generation.n_read == 1 + 3
    assert len(contexts.made) == 1


def test_more_preferences_than_before_keep_what_was_read() -> None:
    engine, contexts = engine_of()
    run(engine, request([[*HISTORY, 4], [*HISTORY, 5]], reuse=True, max_tokens=4))
    asked = request([[*HISTORY, 4], [*HISTORY, 6], [*HISTORY, 7], [*HISTORY, 8]], reuse=True)
    written, generation = run(engine, asked)
    assert len(contexts.made) == 2
    assert generation.n_read == 4
    assert written == alone(asked, n_ctx=96)[0]


def test_without_reuse_nothing_is_left() -> None:
    engine, contexts = engine_of()
    run(engine, request([HISTORY, [*HISTORY, 4]]))
    assert held(contexts) == [[], []]


def test_a_failure_of_the_decode_forgets_all() -> None:
    engine, contexts = engine_of()
    run(engine, request([HISTORY], reuse=True, max_tokens=3))
    contexts.current.error = EngineError("llama.cpp failed")
    generation = engine.submit(request([[*HISTORY, 4]], reuse=True))
    with pytest.raises(EngineError):
        list(engine.stream(generation))
    asked = request([[*HISTORY, 4]], reuse=True)
    written, generation = run(engine, asked)
    assert generation.n_read == len(HISTORY) + 1
    assert written == alone(asked, n_ctx=96)[0]


def test_a_mixture_that_changes_acts_on_the_next_token() -> None:
    engine, _ = engine_of()
    prompts = [HISTORY, [*HISTORY, 4]]
    seen = {}
    for strength in (0.0, 4.0):
        generation = engine.submit(request(prompts, strength=0.0, max_tokens=12))
        pieces = []
        for piece in engine.stream(generation):
            pieces.append(piece.token)
            if len(pieces) == 3:
                generation.mixture = Mixture([1 - strength, strength], [0.0, 1.0])
        seen[strength] = pieces
    assert seen[0.0][:3] == seen[4.0][:3]
    assert seen[0.0] != seen[4.0]


@pytest.mark.parametrize("method", ["copy", "truncate", "free"])
@pytest.mark.parametrize("skip", range(4))
def test_a_failure_while_a_generation_is_seated_costs_it_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str, skip: int
) -> None:
    engine, contexts = engine_of()
    run(engine, request([HISTORY, [*HISTORY, 4]], reuse=True, max_tokens=3))
    original = getattr(contexts.current, method)
    calls = iter(range(skip, -1, -1))

    def fail(*arguments: int) -> None:
        original(*arguments)
        if next(calls, None) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(contexts.current, method, fail)
    asked = request([[*HISTORY, 5], [*HISTORY, 5, 6]], reuse=True, max_tokens=6)
    generation = engine.submit(asked)
    for _ in range(50):
        try:
            if not engine.step():
                break
        except KeyboardInterrupt:
            pass
    if generation.error is None:
        written = [piece.token for piece in generation.pieces if piece.token is not None]
        assert written == alone(asked, n_ctx=96)[0]


def test_a_stream_collected_while_another_is_seated_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, contexts = engine_of()
    asked = request([HISTORY], max_tokens=3)
    first, second = engine.submit(asked), engine.submit(asked)
    original = contexts.current.free

    def free(sequence: int) -> None:
        original(sequence)
        engine.cancel(first)

    monkeypatch.setattr(contexts.current, "free", free)
    while engine.step():
        pass
    assert first.finish_reason == "cancelled"
    assert second.is_finished
    assert [p.token for p in second.pieces if p.token is not None] == alone(asked, n_ctx=96)[0]


# Real contexts


def read(context: Context, sequence: int, tokens: Sequence[int]) -> np.ndarray:
    context.add(sequence, np.array(tokens, np.int32), output=True)
    row: np.ndarray = context.decode()[0].copy()
    return row


def test_a_cut_sequence_continues_as_if_never_longer(
    any_model: Model, make_context: MakeContext
) -> None:
    context = make_context(any_model)
    story = any_model.tokenize("the people of the old house by the sea").tolist()
    read(context, 1, [*story, 5, 6, 7])
    if not context.can_truncate:
        with pytest.raises(EngineError, match="cannot be cut"):
            context.truncate(1, len(story))
        return
    context.truncate(1, len(story))
    assert context.length(1) == len(story)
    again = read(context, 1, [9])
    read(context, 0, story)
    np.testing.assert_array_equal(again, read(context, 0, [9]))


@pytest.mark.parametrize("n_sequences", [1, 2, 5])
@pytest.mark.parametrize("source", [0, 1])
def test_a_saved_sequence_continues_bit_for_bit(
    any_model: Model, make_context: MakeContext, n_sequences: int, source: int
) -> None:
    context = make_context(any_model)
    story = any_model.tokenize("the people of the old house by the sea").tolist()
    read(context, source, story)
    data = context.save(source)
    expected = read(context, source, [9])
    other = make_context(any_model, n_sequences)
    try:
        other.restore(n_sequences - 1, data, len(story))
    except EngineError:
        # With sliding windows there are two memories, and no telling where the second begins.
        assert any_model.metadata("general.architecture") in ("gemma3", "mamba", "lfm2")
        assert n_sequences != 2
        assert other.length(n_sequences - 1) == 0
        return
    np.testing.assert_array_equal(read(other, n_sequences - 1, [9]), expected)


def test_what_was_restored_is_cut_only_where_it_can_be(
    any_model: Model, make_context: MakeContext
) -> None:
    """Another end of the same beginning, after a restore, against an engine that has nothing cached."""
    random = np.random.default_rng(0)
    story = random.integers(4, any_model.n_vocab - 4, 150).astype(np.int32)

    def engine() -> Engine:
        return Engine(any_model, lambda n: make_context(any_model, n, n_ctx=512), 2)

    def write(engine: Engine, prompt: Tokens, reuse: bool) -> list[Alternative]:
        asked = Request(
            [prompt], Mixture([1.0], [1.0]), Sampler(), 1, reuse=reuse, n_alternatives=any_model.n_vocab
        )
        (piece, *_) = list(engine.stream(engine.submit(asked)))
        assert piece.explanation is not None
        return sorted(piece.explanation.alternatives, key=lambda each: each.token)

    first = engine()
    write(first, story, True)
    saved = first.save(story)
    assert saved is not None
    restored = engine()
    restored.restore(*saved)
    shorter = np.concatenate([story[:70], np.array([9, 11], np.int32)])
    found, expected = write(restored, shorter, True), write(engine(), shorter, False)
    for one, other in zip(found, expected, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=2e-3)


def test_a_memory_of_another_length_is_refused(tiny_model: Model, make_context: MakeContext) -> None:
    context = make_context(tiny_model)
    read(context, 0, [5, 6, 7])
    data = context.save(0)
    for length in (2, 4, 10_000):
        with pytest.raises(EngineError):
            context.restore(1, data, length)
        assert context.length(1) == 0
    with pytest.raises(EngineError, match="unknown form"):
        context.restore(1, data[:10], 3)


def test_a_real_engine_reuses_what_it_read(any_model: Model, make_context: MakeContext) -> None:
    engine = Engine(any_model, lambda n: make_context(any_model, n, n_ctx=512), 2)
    story = any_model.tokenize("the people of the old house by the sea were learning to read " * 3)
    tails = [any_model.tokenize(text) for text in ("and write", "and be kind", "and not to write")]

    def asked(*prompts: np.ndarray) -> Request:
        mixture = Mixture([-1.0, 2.0], [0.0, 1.0], 0.1)
        return Request(list(prompts), mixture, Sampler(), max_tokens=6, reuse=True)

    run(engine, asked(story, np.concatenate([story, tails[0]])))
    held = engine._sequences._cached[0]
    assert held[: len(story)].tolist() == story.tolist()
    both = [np.concatenate([held, tails[1], tail]) for tail in (tails[1], tails[2])]
    _, generation = run(engine, asked(*both))
    shared = generation.n_prefill
    assert shared < len(held)  # the conversation was not read again
    assert generation.n_read == shared
    engine.close()


def test_saving_takes_what_a_prompt_begins_with() -> None:
    engine, contexts = engine_of()
    run(engine, request([HISTORY], reuse=True, max_tokens=3))
    kept = list(contexts.current.held[0])
    saved = engine.save(np.array([*kept, 4, 4], np.int32))
    assert saved is not None
    tokens, data = saved
    assert tokens.tolist() == kept
    other, _ = engine_of()
    other.restore(tokens, data)
    asked = request([[*kept, 4, 5]], reuse=True)
    written, generation = run(other, asked)
    assert generation.n_read == 2
    assert written == alone(asked, n_ctx=96)[0]
    assert text_of(written)
    assert engine.save(np.array([9, 9], np.int32)) is None
