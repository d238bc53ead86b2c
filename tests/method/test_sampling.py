from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from literal import log_softmax

from amulet_gguf.errors import SettingError
from amulet_gguf.method.realign import combine
from amulet_gguf.method.sampling import PLAIN, Sampler, exp_below, penalize
from amulet_gguf.method.vocabulary import Vocabulary
from amulet_gguf.settings import Settings

Row = npt.NDArray[np.float32]

INF = math.inf
LARGEST = float(np.finfo(np.float32).max)
FOUR = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)


def plain(**options: Any) -> Sampler:
    """A sampler of greedy settings but for some, which may lie outside what `Settings` allows."""
    return Sampler(cast(Settings, SimpleNamespace(**{**vars(PLAIN), **options})))


class Sweep:
    """In the place of random numbers: the middles of `size` equal parts of [0, 1), in turn."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return (self.drawn - 0.5) / self.size


def swept(row: Row, size: int, **options: Any) -> Counter[int]:
    """How often each token is drawn in a sweep: its probability times `size`, give or take one."""
    sampler = plain(**options)
    sampler._random = Sweep(size)  # type: ignore[assignment]
    return Counter(sampler.sample(row) for _ in range(size))


def filtered(row: Row, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, **_: float) -> list[int]:
    """The tokens that top-k, top-p and min-p keep, in this order, by a full sort in float64."""
    order = np.argsort(-row.astype(np.float64), kind="stable")
    order = order[row[order] > -INF]
    if top_k > 0:
        order = order[:top_k]
    p = np.exp(log_softmax(row[order]))
    if top_p < 1:
        reached = np.flatnonzero(np.cumsum(p) >= top_p)
        size = int(reached[0]) + 1 if reached.size else p.size
        order, p = order[:size], p[:size]
    return [int(token) for token, share in zip(order, p / p[0], strict=True) if share >= min_p]


def probabilities(row: Row, temperature: float = 1.0, **options: float) -> dict[int, float]:
    kept = filtered(row, **options)  # type: ignore[arg-type]
    shares = np.exp(log_softmax(row[kept].astype(np.float64) / temperature))
    return dict(zip(kept, shares.tolist(), strict=True))


def assert_swept(row: Row, expected: dict[int, float], size: int = 1000, **options: Any) -> None:
    found = swept(row, size, **options)
    assert set(found) <= set(expected)
    for token, share in expected.items():
        assert found[token] == pytest.approx(share * size, abs=1.05)


# --- four tokens, worked out by hand ---


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [4, 3, 2, 1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [4, 3]),
        ({"top_k": 4}, [4, 3, 2, 1]),
        ({"top_k": 2**31 - 1}, [4, 3, 2, 1]),
        ({"top_p": 0.001}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [4, 3]),
        ({"top_p": 0.69}, [4, 3]),
        ({"top_p": 0.71}, [4, 3, 2]),
        ({"top_p": 0.91}, [4, 3, 2, 1]),
        ({"min_p": 0.2}, [4, 3, 2, 1]),
        ({"min_p": 0.3}, [4, 3, 2]),
        ({"min_p": 0.7}, [4, 3]),
        ({"min_p": 1.0}, [1]),
        ({"temperature": 0.5}, [16, 9, 4, 1]),
        ({"temperature": 2.0}, [2, math.sqrt(3), math.sqrt(2), 1]),
        # Top-p judges what top-k kept, renormalized: .44 + .33 >= .75, though .4 + .3 < .75.
        ({"top_k": 3, "top_p": 0.75}, [4, 3]),
        # Min-p comes after top-p: it does not shrink what top-p adds up.
        ({"top_p": 0.75, "min_p": 0.3}, [4, 3, 2]),
        ({"top_k": 4, "top_p": 0.75, "min_p": 0.3}, [4, 3, 2]),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.8}, [1]),
        # Temperature comes last: the filters do not see it.
        ({"top_p": 0.41, "temperature": 2.0}, [2, math.sqrt(3)]),
        ({"min_p": 0.7, "temperature": 0.5}, [16, 9]),
        ({"top_k": 2, "temperature": 1e9}, [1, 1]),
    ],
)
def test_stages_on_four_tokens(options: dict[str, Any], weights: list[float]) -> None:
    expected = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    assert_swept(FOUR, expected, **{"temperature": 1.0, **options})
    # Neither the order of the tokens, nor masked ones between them, nor a constant play a part.
    row = np.full(9, -INF, np.float32)
    places = [7, 1, 4, 2]
    row[places] = FOUR + np.float32(3)
    moved = {places[token]: share for token, share in expected.items()}
    assert_swept(row, moved, **{"temperature": 1.0, **options})


def test_the_nucleus_ends_where_top_p_is_just_reached() -> None:
    row = np.zeros(8, np.float32)  # shares of an eighth, which no rounding blurs
    assert_swept(row, dict.fromkeys(range(4), 0.25), temperature=1.0, top_p=0.5)
    assert_swept(row, dict.fromkeys(range(2), 0.5), temperature=1.0, top_p=0.5, top_k=4)
    assert_swept(row, dict.fromkeys(range(5), 0.2), temperature=1.0, top_p=0.500001)


# --- against an independent implementation ---

logit = st.one_of(st.floats(-100, 100, width=32), st.floats(-3, 3, width=32), st.just(-INF))
filters = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(0, 45),
        "top_p": st.floats(0.001, 1),
        "min_p": st.one_of(st.floats(0, 1), st.floats(0, 0.01)),
    },
)


def assert_kept(row: Row, options: dict[str, Any]) -> None:
    """Compare the candidates with a full sort; where the two may round differently, both are right.

    Top-p's total is added from exponentials in float32 (relative error 1e-5), and min-p's bound is a
    float32 logit.
    """
    slack = 2e-5 + float(np.abs(row[np.isfinite(row)]).max()) * 2.0**-22
    top_p, min_p = options.get("top_p", 1.0), options.get("min_p", 0.0)
    fewest = {
        **options,
        "top_p": top_p * (1 - slack) if top_p < 1 else 1.0,
        "min_p": min_p * (1 + slack),
    }
    most = {**options, "top_p": top_p * (1 + slack), "min_p": min_p * (1 - slack)}
    # At an enormous temperature all candidates are equally probable, and a sweep meets each of them.
    found = set(swept(row, 3 * row.size + 2, temperature=1e9, **options))
    assert set(filtered(row, **fewest)) <= found <= set(filtered(row, **most))


@given(st.lists(logit, min_size=1, max_size=40), filters)
@example([0.0] * 10, {"top_k": 3})  # ties go by index
@example([0.0] * 10, {"top_p": 0.5})
@example([-1.0, -0.0], {"min_p": 1.0})  # the bound is 0.0, the best of the block -0.0
@example([0.0, -60.0, -70.0, -INF], {"top_k": 3})
@example([0.0, -5.0, -9.0, -30.0], {"top_k": 4, "top_p": 0.9999})
@settings(deadline=None, max_examples=300)
def test_candidates_are_those_of_a_full_sort(logits: list[float], options: dict[str, Any]) -> None:
    assume(max(logits) > -INF)
    assert_kept(np.array(logits, np.float32), options)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 2048])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1024, "top_p": 0.8, "min_p": 0.02}],
)
def test_candidates_across_blocks(size: int, options: dict[str, Any]) -> None:
    row = np.random.default_rng(size).normal(0, 2, size).astype(np.float32)
    row[::7] = -INF
    assert_kept(row, options)


@given(st.lists(logit, min_size=1, max_size=30), filters, st.floats(0.05, 100))
@settings(deadline=None, max_examples=150)
def test_draws_follow_the_filtered_distribution(
    logits: list[float], options: dict[str, Any], temperature: float
) -> None:
    assume(max(logits) > -INF)
    row = np.array(logits, np.float32)
    expected = probabilities(row, temperature, **options)
    found = swept(row, 300, temperature=temperature, **options)
    if set(found) != set(expected):  # a filter rounded differently; `assert_kept` judges that
        assert_kept(row, options)
        assume(set(found) <= set(expected))
    for token, share in expected.items():
        assert found[token] == pytest.approx(share * 300, abs=1.05)


def masked(size: int, spread: float) -> Row:
    random = np.random.default_rng(size)
    row = random.normal(0, spread, size).astype(np.float32)
    row[random.random(size) < 0.3] = -INF
    return row


@pytest.mark.parametrize(
    ("size", "spread", "options", "draws"),
    [
        (50, 1.0, {}, 2000),
        (4096, 3.0, {"temperature": 0.7}, 2000),
        (151_936, 3.0, {"top_p": 0.9}, 150),
        (151_936, 3.0, {"top_k": 200, "temperature": 1.5}, 400),
        (151_936, 0.05, {}, 200),  # flat
        (151_936, 0.05, {"top_p": 0.5}, 100),
        (151_936, 0.05, {"min_p": 0.95, "temperature": 0.8}, 200),
    ],
)
def test_frequencies_of_seeded_draws(
    size: int, spread: float, options: dict[str, Any], draws: int
) -> None:
    row = masked(size, spread)
    expected = probabilities(row, **options)
    # Tokens from the most to the least probable, in at most eleven groups of similar weight.
    group_of: dict[int, int] = {}
    weight = Counter[int]()
    for token, share in sorted(expected.items(), key=lambda item: -item[1]):
        group = int(sum(weight.values()) * 10 + 1e-9)
        group_of[token] = group
        weight[group] += share  # type: ignore[assignment]
    sampler = plain(**{"temperature": 1.0, "seed": 7, **options})
    found = Counter(group_of[sampler.sample(row)] for _ in range(draws))
    chi_square = sum((found[g] - draws * w) ** 2 / (draws * w) for g, w in weight.items())
    assert chi_square < 32  # of at most 10 degrees of freedom: once in 2,500 seeds


# --- random numbers ---


def test_equal_seeds_choose_equal_tokens_and_others_others() -> None:
    row = np.zeros(1000, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = plain(temperature=1.0, seed=seed)
        return [sampler.sample(row) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(2**64 - 1) == draw(2**64 - 1)
    assert len({tuple(draw(seed)) for seed in (0, 1, 2, 2**64 - 1, None, None)}) == 6


@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(1, 0))])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 1e-30}])
@pytest.mark.parametrize("size", [3, 1024, 1500])
def test_extreme_random_numbers_choose_unmasked_tokens(
    uniform: float, options: dict[str, Any], size: int
) -> None:
    class Extreme:
        def random(self) -> float:
            return uniform

    row = np.full(size, -200.0, np.float32)  # whose weights vanish
    row[0] = row[-1] = -INF
    row[size // 2] = 0.0
    sampler = plain(temperature=1.0, **options)
    sampler._random = Extreme()  # type: ignore[assignment]
    assert row[sampler.sample(row)] > -INF


@given(st.integers(1, 3000), st.integers(0, 2**32), filters, st.floats(0.01, 100))
@settings(deadline=None)
def test_masked_tokens_are_never_drawn(
    size: int, seed: int, options: dict[str, Any], temperature: float
) -> None:
    random = np.random.default_rng(seed)
    row = np.full(size, -INF, np.float32)
    allowed = random.integers(0, size, 3)
    row[allowed] = random.normal(0, 50, 3)
    sampler = plain(temperature=temperature, seed=seed, **options)
    assert {sampler.sample(row) for _ in range(20)} <= set(allowed.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("only", [-LARGEST, -1e30, 0.0, LARGEST])
def test_the_only_finite_token_is_drawn(
    temperature: float, options: dict[str, Any], only: float
) -> None:
    for at in (0, 1, 1500, 2999):
        row = np.full(3000, -INF, np.float32)
        row[at] = only
        assert plain(temperature=temperature, seed=1, **options).sample(row) == at


# --- temperature ---


@given(st.lists(logit, min_size=1, max_size=50), filters)
@settings(deadline=None)
def test_temperature_zero_takes_the_first_of_the_best(
    logits: list[float], options: dict[str, Any]
) -> None:
    assume(max(logits) > -INF)
    row = np.array(logits, np.float32)
    assert plain(temperature=0.0, **options).sample(row) == np.argmax(row)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-38, 1e-39, 1e-300, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_tiny_temperature_takes_one_of_the_best(temperature: float, options: dict[str, Any]) -> None:
    row = np.array([1.0, 2.0, 4.999, 5.0, -INF, 5.0, 0.0], np.float32)
    assert set(swept(row, 40, temperature=temperature, **options)) == {3, 5}


def test_a_huge_temperature_is_uniform_over_what_is_kept() -> None:
    row = np.array([9, 8, 7, -8, -INF, -9], np.float32)
    assert_swept(row, dict.fromkeys([0, 1, 2, 3, 5], 0.2), temperature=1e9)
    assert_swept(row, dict.fromkeys([0, 1, 2], 1 / 3), temperature=1e9, top_k=3)
    assert_swept(row, dict.fromkeys([0, 1], 0.5), temperature=1e9, top_p=0.9)


# --- repetition penalty ---


def test_the_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    row = np.array([3, -3, 0, -INF, 3, -3], np.float32)
    penalize(row, np.array([0, 1, 2, 3]), 1.5)
    assert row.tolist() == [2.0, -4.5, 0.0, -INF, 3.0, -3.0]
    penalize(row, np.array([4, 5]), 0.5)
    assert row.tolist() == [2.0, -4.5, 0.0, -INF, 6.0, -1.5]


def written(tokens: list[int], **options: Any) -> Row:
    """What the sampler makes of a row of 1s and a -1 after it has chosen `tokens`."""
    sampler = plain(temperature=0.0, **options)
    for token in tokens:
        row = np.full(8, -1e9, np.float32)
        row[token] = 1e9
        assert sampler.sample(row) == token
    row = np.array([1, 1, 1, 1, 1, 1, 1, -1], np.float32)
    sampler.sample(row)
    return row


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        ([], {}, [1, 1, 1, 1, 1, 1, 1, -1]),
        ([2], {}, [1, 1, 0.5, 1, 1, 1, 1, -1]),
        ([7, 0], {}, [0.5, 1, 1, 1, 1, 1, 1, -2]),
        ([2, 2, 2], {}, [1, 1, 0.5, 1, 1, 1, 1, -1]),  # once, however often it was written
        ([1, 2, 3], {"repeat_last_n": 2}, [1, 1, 0.5, 0.5, 1, 1, 1, -1]),
        ([1, 2, 1, 3], {"repeat_last_n": 2}, [1, 0.5, 1, 0.5, 1, 1, 1, -1]),
        ([1, 2, 3], {"repeat_last_n": 3}, [1, 0.5, 0.5, 0.5, 1, 1, 1, -1]),
        ([1, 2, 3], {"repeat_last_n": 0}, [1, 1, 1, 1, 1, 1, 1, -1]),
        ([1, *[2] * 63], {}, [1, 0.5, 0.5, 1, 1, 1, 1, -1]),  # 64 are looked back
        ([1, *[2] * 64], {}, [1, 1, 0.5, 1, 1, 1, 1, -1]),
        ([1], {"repeat_penalty": 1.0}, [1, 1, 1, 1, 1, 1, 1, -1]),
    ],
)
def test_the_penalty_looks_back_so_far(
    tokens: list[int], options: dict[str, Any], expected: list[float]
) -> None:
    assert written(tokens, **{"repeat_penalty": 2.0, **options}).tolist() == expected


def test_the_penalty_comes_before_the_filters() -> None:
    sampler = plain(temperature=1.0, top_k=1, repeat_penalty=2.0, seed=0)
    chosen = [sampler.sample(np.array([4, 3, 2.5, 0], np.float32)) for _ in range(4)]
    assert chosen == [0, 1, 2, 0]


# --- presence and frequency penalty, biases ---


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        ([], {"presence_penalty": 2.0}, [1, 1, 1, 1, 1, 1, 1, -1]),
        ([2, 2, 2], {"presence_penalty": 0.5}, [1, 1, 0.5, 1, 1, 1, 1, -1]),
        ([2, 2, 7], {"frequency_penalty": 0.25}, [1, 1, 0.5, 1, 1, 1, 1, -1.25]),
        ([1, 1, 3], {"frequency_penalty": 0.5, "presence_penalty": -0.5}, [1, 0.5, 1, 1, 1, 1, 1, -1]),
        ([1, *[2] * 99], {"presence_penalty": 0.5}, [1, 0.5, 0.5, 1, 1, 1, 1, -1]),  # all of the answer
        ([2], {"presence_penalty": 1.0, "repeat_penalty": 2.0}, [1, 1, -0.5, 1, 1, 1, 1, -1]),
    ],
)
def test_presence_and_frequency_penalties(
    tokens: list[int], options: dict[str, Any], expected: list[float]
) -> None:
    """c[j] times the one and once the other, as OpenAI's documentation has it."""
    assert written(tokens, **options).tolist() == expected


class Words:
    """A vocabulary of eight tokens: the digits, which are their own texts."""

    n_vocab = 8

    def tokenize(self, text: str, *, special: bool = False) -> npt.NDArray[np.int32]:
        return np.array([int(each) for each in text.removeprefix("x")], np.int32)


def biased(logits: Row, **biases: float) -> Sampler:
    words = cast(Vocabulary, Words())
    sampler = Sampler(
        PLAIN.replace(logit_bias={k.removeprefix("_"): v for k, v in biases.items()}), words
    )
    sampler.bias(logits)
    return sampler


def test_biases_are_added_to_every_branch() -> None:
    logits = np.zeros((3, 8), np.float32)
    biased(logits, _2=5.0, x23=-1.0)
    assert logits.tolist() == [[0, 0, 4, -1, 0, 0, 0, 0]] * 3


@pytest.mark.parametrize("strength", [0.0, 1.0, 5.65, -2.0])
def test_a_bias_on_the_branches_is_a_bias_on_their_combination(strength: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 8)).astype(np.float32)
    expected = combine(logits, (1 - strength, strength))
    expected[5] += 3
    biased(logits, _5=3.0)
    np.testing.assert_allclose(combine(logits, (1 - strength, strength)), expected, rtol=1e-4, atol=1e-4)


def test_a_bias_can_bring_a_token_back_that_plausibility_would_mask() -> None:
    logits = np.array([[0, 0, 9, 0, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0, 0, 0]], np.float32)
    sampler = biased(logits, _4=100.0)
    assert sampler.sample(combine(logits, (-4.0, 5.0), 0.5)) == 4


@pytest.mark.parametrize("plausibility", [0.0, 0.1, 1.0])
def test_a_banned_token_is_never_chosen_while_there_is_another(plausibility: float) -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[:, 3] = (-1000, 1000)  # amplified far beyond what -100 takes away
    assert int(np.argmax(combine(logits, (-4.0, 5.0)))) == 3
    sampler = biased(logits, _3=-100.0)
    row = combine(logits, (-4.0, 5.0), plausibility)
    assert sampler.sample(row) != 3
    everything = np.zeros((2, 8), np.float32)
    sampler = biased(everything, x01234567=-100.0)
    assert sampler.sample(combine(everything, (-4.0, 5.0), plausibility)) in range(8)


def test_a_text_biases_each_of_its_tokens_once() -> None:
    logits = np.zeros((1, 8), np.float32)
    biased(logits, x222=-20.0)
    assert logits[0].tolist() == [0, 0, -20, 0, 0, 0, 0, 0]


def test_a_token_that_there_is_not_cannot_be_biased() -> None:
    with pytest.raises(SettingError, match="there is no token 8; the model has 8") as error:
        biased(np.zeros((1, 8), np.float32), _8=1.0)
    assert error.value.field == "logit_bias"


def test_without_a_penalty_the_row_is_only_read() -> None:
    row = masked(2000, 2.0)
    before = row.copy()
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}):
        sampler = plain(temperature=0.8, seed=1, **options)
        sampler.sample(row)
        sampler.sample(row)
    np.testing.assert_array_equal(row, before)


# --- the exponential ---


@given(st.floats(-8, 8), st.floats(-1000, 1000, width=32), st.integers(0, 2**32))
@example(math.log2(0.021660853267051076), -193.81433, 0)  # near the worst: rounding errors add up
@settings(deadline=None)
def test_the_exponential_is_as_accurate_as_it_says(log_scale: float, peak: float, seed: int) -> None:
    scale = 2.0**log_scale
    below = np.random.default_rng(seed).uniform(0, 130 * math.log(2) / scale, 5000)
    values = (np.float32(peak) - below).astype(np.float32)
    values = np.append(values[values <= np.float32(peak)], np.array([-INF, peak], np.float32))
    out = np.full_like(values, np.nan)
    total = exp_below(values, np.float32(peak), scale, out)
    exact = np.exp((values.astype(np.float64) - float(np.float32(peak))) * scale)
    normal = exact > 2.0**-126 * (1 + 1e-4)
    assert (np.abs(out[normal] / exact[normal] - 1) < 2e-5).all()
    assert (out[exact < 2.0**-126 * (1 - 1e-4)] == 0).all()
    assert out[-1] == 1
    assert total == pytest.approx(out.astype(np.float64).sum(), rel=1e-12)
