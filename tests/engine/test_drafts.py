"""Drafts: what is guessed, when it pays, and that it changes nothing but the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import Contexts, FakeVocabulary, alone, mixture, request
from fixture_types import MakeContext
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.engine.drafts import MAX_DRAFT, Drafts, RowTimes, Step, TextSource, best_size
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.generation import Generation
from amulet_gguf.engine.request import Request
from amulet_gguf.llama.model import Model
from amulet_gguf.method.mixture import Fade, Mixture
from amulet_gguf.method.sampling import PLAIN, Sampler

PAIR = [[2, 4, 5], [2, 4, 5, 6]]
NOTHING = np.empty(0, np.int32)
STEP = Step(rows=2, rows_each=2, limit=MAX_DRAFT)


def source(*text: int, min_match: int = 1, accepted: float = 1.0, is_answer: bool = False) -> TextSource:
    tokens = np.array(text, np.int32)
    return TextSource("text", tokens, min_match=min_match, accepted=accepted, is_answer=is_answer)


def run(asked: Request, **sizes: Any) -> tuple[Generation, list[int], int]:
    """Return a generation, what it wrote, and in how many steps."""
    contexts = Contexts(**sizes)
    engine = Engine(FakeVocabulary(), contexts)
    generation = engine.submit(asked)
    while engine.step():
        pass
    assert generation.error is None
    tokens = [piece.token for piece in generation.pieces if piece.token is not None]
    return generation, tokens, len(contexts.current.batches)


class Typical(RowTimes):
    """What fake contexts take means nothing."""

    def told(self, rows: int, seconds: float) -> None:
        pass


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amulet_gguf.engine.engine.RowTimes", Typical)


# Guesses


@pytest.mark.parametrize(
    ("text", "written", "guessed"),
    [
        ([1, 2, 3, 4, 5], [9, 2], [3, 4, 5]),
        ([1, 2, 3, 1, 2, 4], [1, 2], [4]),  # of two, the last
        ([7, 1, 2, 3, 8, 1, 2, 4], [7, 1, 2], [3, 8, 1]),  # but rather the longest
        ([1, 2, 3], [3], []),  # nothing follows
        ([1, 2, 3], [4], []),
        ([1, 2, 3], [], []),
    ],
)
def test_what_followed_before_is_guessed_to_follow_again(
    text: list[int], written: list[int], guessed: list[int]
) -> None:
    assert source(*text).propose(NOTHING, written, 3) == guessed


def test_an_old_answer_is_guessed_from_its_beginning() -> None:
    assert source(5, 6, 7, is_answer=True).propose(NOTHING, [], 2) == [5, 6]


def test_a_short_match_may_be_too_little() -> None:
    text = (1, 2, 3, 4, 5)
    assert source(*text, min_match=3).propose(NOTHING, [9, 2, 3], 2) == []
    assert source(*text, min_match=3).propose(NOTHING, [1, 2, 3], 2) == [4, 5]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 4), st.integers(0, MAX_DRAFT))
def test_more_is_guessed_of_whoever_is_right_more_often(
    one: float, other: float, rows: int, limit: int
) -> None:
    step = Step(rows, rows, limit)
    low, high = sorted((one, other))
    assert best_size(low, step) <= best_size(high, step) <= limit
    assert best_size(0.0, step) == 0


@pytest.mark.parametrize("rows", [15, 16, 17, 64, 1000])
def test_nothing_is_guessed_where_nobody_knows_what_it_would_cost(rows: int) -> None:
    assert best_size(1.0, Step(rows, 2, MAX_DRAFT)) == 0


MACHINES: dict[str, Callable[[int], float]] = {
    "gives rows away": lambda rows: 1.0,
    "charges each": lambda rows: rows,
    "as the first guess": lambda rows: RowTimes()[rows],
    "1.5 billion parameters": lambda rows: float(np.interp(rows, [2, 4, 8, 16], [62, 96, 223, 261])),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("accepted", [0.3, 0.8, 0.95])
def test_how_many_to_guess_is_learned_from_what_steps_take(machine: str, accepted: float) -> None:
    """Within some hundred steps of changing lengths, what is chosen is near the best on this machine."""
    random = np.random.default_rng(0)
    times, of_machine = RowTimes(), MACHINES[machine]

    def rate(size: int) -> float:
        return float(sum(accepted**i for i in range(size + 1)) / of_machine(2 + 2 * size))

    for t in range(300):
        size = best_size(accepted, Step(2, 2, MAX_DRAFT, times))
        size = size if t % 2 else 0  # every other step, nobody had a guess
        rows = 2 + 2 * max(size, t % 32 == 0)
        depth = 1 + t / 300  # a fuller context is slower
        times.told(rows, 0.02 * depth * of_machine(rows) * float(random.lognormal(0, 0.1)))
    best = max(map(rate, range(MAX_DRAFT + 1)))
    assert rate(best_size(accepted, Step(2, 2, MAX_DRAFT, times))) > 0.85 * best


@pytest.mark.parametrize("accepted", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("change", [0.0, 0.9, 3.0])
@pytest.mark.parametrize("n_guessing", [1, 2, 10])
def test_what_changes_of_rows_take_is_learned(change: float, accepted: float, n_guessing: int) -> None:
    """Guesses come in runs, between ten steps of none, on a machine that charges for the first two steps
    after a change alone."""
    random = np.random.default_rng(0)
    times, before, chosen = RowTimes(), [2, 2], []
    for t in range(1000):
        guesses = t % (10 + n_guessing) >= 10
        size = best_size(accepted, Step(2, 2, MAX_DRAFT, times)) if guesses else 0
        rows = 2 + 2 * size
        seconds = 1.0 + change * (before != [rows, rows])
        times.told(rows, seconds * float(random.lognormal(0, 0.05)))
        before = [before[1], rows]
        if guesses and t > 300:
            chosen.append(size)
    gain = sum(accepted**i for i in range(1, MAX_DRAFT + 1))  # tokens of a step
    pays = np.count_nonzero(chosen) / len(chosen)
    if gain > 3 * change + 0.5:  # what one step brings pays for one to it, and two after it
        assert pays > 0.9
    elif n_guessing * gain < 3 * change:  # all of a run do not
        assert pays < 0.1


@given(st.lists(st.tuples(st.integers(-1, 200), st.floats(0, 1e6)), max_size=50))
def test_times_stay_positive_and_more_rows_take_no_less(steps: list[tuple[int, float]]) -> None:
    times = RowTimes()
    for rows, seconds in steps:
        times.told(rows, seconds)
    found = [times[rows] for rows in range(1, 17)]
    assert found[0] > 0
    assert np.isfinite(found).all()
    assert found == sorted(found)


def test_who_is_always_wrong_is_hardly_asked_and_gets_another_chance() -> None:
    it = source(*range(1, 12), accepted=0.9)
    drafts, sizes = Drafts(NOTHING, [it]), []
    for _ in range(200):
        sizes.append(len(drafts.propose([1], STEP)))
        if sizes[-1]:
            drafts.told(0)
    assert sizes[0] > 1
    assert 1 <= sum(map(bool, sizes[20:])) <= 7
    assert max(sizes[20:]) == 1
    for _ in range(400):
        size = len(drafts.propose([1], STEP))
        if size:
            drafts.told(size)
    assert it.accepted > 0.9


def test_a_wrong_source_is_asked_again_beside_one_that_guesses() -> None:
    wrong, right = source(*range(1, 12), accepted=0.0), source(*range(1, 12), accepted=1.0)
    drafts = Drafts(NOTHING, [wrong, right])
    for _ in range(100):
        n = len(drafts.propose([1], STEP))
        drafts.told(0 if drafts._asked is wrong else n)
    assert wrong.n_silent < 40


def test_the_next_source_is_asked_where_the_first_has_nothing() -> None:
    first, second = source(8, 9), source(1, 2, 3)
    drafts = Drafts(NOTHING, [first, second])
    assert drafts.propose([1], STEP) == [2, 3]
    drafts.told(0)
    assert first.accepted == 1.0
    assert second.accepted < 1.0


# What is written


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_a_right_draft_saves_steps_and_a_wrong_one_changes_nothing(
    seed: int | None, strength: float
) -> None:
    asked = request(PAIR, strength=strength, seed=seed, max_tokens=30)
    tokens, reason = alone(asked, seed)
    assert len(tokens) > 5
    n_steps = {}
    for kind, text in (("right", tokens), ("wrong", [4] * 40), ("none", [])):
        drafts = Drafts(NOTHING, [source(*text, is_answer=True)]) if text else None
        again = request(PAIR, strength=strength, seed=seed, max_tokens=30, drafts=drafts)
        generation, written, n_steps[kind] = run(again, n_batch=40)
        assert (written, generation.finish_reason) == (tokens, reason)
        assert generation.n_right <= generation.n_guessed
    assert n_steps["right"] < n_steps["wrong"] <= n_steps["none"]  # "wrong" guesses right at times
    assert n_steps["right"] <= 2 + len(tokens) // 4


@pytest.mark.parametrize("max_tokens", range(1, 9))
@pytest.mark.parametrize("n_ctx", [8, 64])
def test_guesses_stay_within_the_limits(max_tokens: int, n_ctx: int) -> None:
    tokens, _ = alone(request(PAIR, max_tokens=30))
    asked = request(
        PAIR, max_tokens=max_tokens, drafts=Drafts(NOTHING, [source(*tokens, is_answer=True)])
    )
    expected = alone(request(PAIR, max_tokens=max_tokens), n_ctx=n_ctx)
    generation, written, _ = run(asked, n_batch=40, n_ctx=n_ctx)
    assert (written, generation.finish_reason) == expected


def test_a_stop_string_ends_an_answer_in_the_middle_of_a_draft() -> None:
    tokens, _ = alone(request(PAIR, max_tokens=30))
    stop = FakeVocabulary().token_bytes(tokens[3]).decode("utf-8", "replace")
    expected = alone(request(PAIR, stop=[stop]))
    drafts = Drafts(NOTHING, [source(*tokens, is_answer=True)])
    generation, written, _ = run(request(PAIR, stop=[stop], drafts=drafts), n_batch=40)
    assert (written, generation.finish_reason) == expected


def test_each_place_of_a_draft_has_its_own_strength() -> None:
    fade = Fade(3.0, 1.0, 2.0)  # the base is needed at first, and then no more

    def fading() -> Mixture:
        return Mixture([-2.0, 3.0], [0.0, 1.0], 0.3, fade=fade, at=lambda s: [1 - s, s])

    plain = replace(request(PAIR, max_tokens=18), mixture=fading())
    _, tokens, _ = run(plain, n_batch=40)
    assert len(tokens) == 18
    drafts = Drafts(NOTHING, [source(*tokens, is_answer=True)])
    generation, again, n_steps = run(replace(plain, mixture=fading(), drafts=drafts), n_batch=40)
    assert again == tokens
    assert n_steps < 8
    assert generation.n_right > 10


def test_where_a_branch_is_needed_that_was_not_read_the_draft_ends() -> None:
    rising = Fade(1.0, 0.0, 0.5)  # from the preference alone to the base: both are needed between

    def mixed() -> Mixture:
        return Mixture([0.0, 1.0], [0.0, 1.0], fade=rising, at=lambda s: [1 - s, s])

    plain = replace(request(PAIR, max_tokens=12), mixture=mixed())
    _, tokens, _ = run(plain, n_batch=40)
    drafts = Drafts(NOTHING, [source(*tokens, is_answer=True)])
    _, again, _ = run(replace(plain, mixture=mixed(), drafts=drafts), n_batch=40)
    assert again == tokens


def test_a_model_that_cannot_take_tokens_back_gets_no_draft() -> None:
    tokens, _ = alone(request(PAIR, max_tokens=30))

    class Recurrent(Contexts):
        def __call__(self, n_sequences: int) -> Any:
            context = super().__call__(n_sequences)
            context.can_truncate = False
            return context

    engine = Engine(FakeVocabulary(), Recurrent(n_batch=40))
    asked = request(PAIR, max_tokens=30, drafts=Drafts(NOTHING, [source(*tokens, is_answer=True)]))
    generation = engine.submit(asked)
    while engine.step():
        pass
    assert generation.n_guessed == 0
    assert [piece.token for piece in generation.pieces if piece.token is not None] == tokens


def test_real_models_write_the_same(any_model: Model, make_context: MakeContext) -> None:
    story = "the people of the old house by the sea were learning to read and write. " * 3
    branches = [any_model.tokenize(story + "and"), any_model.tokenize(story + "but")]
    found: list[tuple[list[int], Generation]] = []
    for kind in ("none", "right", "at hand"):
        for temperature in (0.0, 1.0):
            drafts = None
            if kind == "right":
                drafts = Drafts(NOTHING, [source(*found[int(temperature)][0], is_answer=True)])
            elif kind == "at hand":
                drafts = Drafts(NOTHING, [source(*branches[1], min_match=1)])
            sampler = Sampler(PLAIN.replace(temperature=temperature, seed=3))
            acting = mixture(2, 2.0, 0.1)
            asked = Request(branches, acting, sampler, max_tokens=40, drafts=drafts)
            engine = Engine(
                any_model,
                lambda n: make_context(any_model, n, n_ctx=512, n_batch=256, n_outputs=16),
                2,
            )
            generation = engine.submit(asked)
            while engine.step():
                pass
            tokens = [p.token for p in generation.pieces if p.token is not None]
            found.append((tokens, generation))
    for i, (tokens, generation) in enumerate(found):
        assert tokens == found[i % 2][0]
        assert generation.n_guessed == 0 or i >= 2
        if i in (2, 3) and make_context(any_model, 1).can_draft:
            assert generation.n_right > 20
