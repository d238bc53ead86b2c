"""Quantized KV caches: smaller, near float16, and whatever is done with a cache goes on right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from fixture_types import MakeContext, Tiny

from amulet_gguf.amulet import Amulet
from amulet_gguf.batch.records import Record
from amulet_gguf.batch.run import size_batch
from amulet_gguf.errors import EngineError, SettingError
from amulet_gguf.llama.cache import CACHE_TYPES, check_cache_type
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.devices import Device, offload
from amulet_gguf.llama.gguf import Header
from amulet_gguf.llama.memory import estimate
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Float32Array, Float64Array, Tokens
from amulet_gguf.settings import Settings

WithCache = Callable[[Model, str], Model]
QUANTIZED = [name for name, kind in CACHE_TYPES.items() if kind.is_quantized]
PROMPT = np.random.default_rng(0).integers(4, 300, 70).astype(np.int32)
END = np.array([9, 11, 13], np.int32)


@pytest.fixture(params=QUANTIZED)
def cache_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def with_cache() -> Iterator[WithCache]:
    """Load the model of another once more, with caches of a type; all are closed when the test ends."""
    with ExitStack() as models:
        yield lambda model, name: models.enter_context(Model(model.path, cache_type=name))


@pytest.fixture
def quantized(any_model: Model, cache_type: str, with_cache: WithCache) -> Model:
    """Each architecture in turn, with each of the smaller caches."""
    return with_cache(any_model, cache_type)


def read(context: Context, sequence: int, tokens: Tokens) -> Float32Array:
    """Return the (V,) logits after some more tokens of a sequence."""
    context.add(sequence, tokens, output=True)
    row: Float32Array = context.decode()[0]
    return row.copy()


def chances(logits: Float32Array) -> Float64Array:
    """Return log-probabilities, whatever the rows."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(logits: Float32Array, other: Float32Array) -> Float64Array:
    """Return the Kullback-Leibler divergence of rows, in nats."""
    p, q = chances(logits), chances(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


# What can be chosen


def test_another_type_is_refused_at_once(tiny: Tiny) -> None:
    for name in ("q5_1", "F16", ""):
        with pytest.raises(SettingError, match="cache_type must be one of f16, q8_0, q4_0") as caught:
            Amulet.load(tiny("llama"), cache_type=name)
        assert caught.value.field == "cache_type"
        with pytest.raises(SettingError, match="one of f16, q8_0, q4_0"):
            Model(tiny("llama"), cache_type=name)


def test_heads_that_are_no_whole_blocks_are_refused_and_never_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_type: str
) -> None:
    monkeypatch.setitem(tiny_models.SIZES, "h", 16)
    path = tiny_models.build("llama", tmp_path / "small-heads.gguf")
    with pytest.raises(SettingError, match="16 numbers, not a multiple of 32") as caught:
        Amulet.load(path, cache_type=cache_type, trust_model=True)
    assert caught.value.field == "cache_type"
    assert "\n" not in str(caught.value)
    with Model(path) as model:
        Context(model, n_ctx=256, n_sequences=2).close()
        model.cache_type = cache_type  # as where the header does not tell
        with pytest.raises(EngineError, match="does not divide"):
            Context(model, n_ctx=256, n_sequences=2)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention.value_length", 80, "80 numbers"),
        ("attention.key_length_swa", 40, "40 numbers"),
        ("attention.indexer.key_length", 128, "index"),
    ],
)
def test_what_a_header_says_of_attention_counts(key: str, value: int, reason: str) -> None:
    plain = {
        "general.architecture": "any", "any.block_count": 2, "any.embedding_length": 128,
        "any.attention.head_count": 2,
    }  # fmt: skip
    check_cache_type(Header(plain, {}), "q8_0")
    other = Header({**plain, f"any.{key}": value}, {})
    check_cache_type(other, "f16")
    with pytest.raises(SettingError, match=reason):
        check_cache_type(other, "q8_0")
    with pytest.raises(SettingError, match="flash attention"):
        check_cache_type(Header({"general.architecture": "grok"}, {}), "q4_0")


def test_a_draft_model_keeps_float16(tiny: Tiny) -> None:
    with Amulet.load(tiny("llama"), n_ctx=256, cache_type="q4_0", draft_model=tiny("llama")) as amulet:
        assert amulet.model.cache_type == "q4_0"
        assert amulet._drafter is not None
        assert amulet._drafter._context.model.cache_type == "f16"


# How near it is


def test_logits_are_near_those_of_float16(
    any_model: Model, with_cache: WithCache, make_context: MakeContext
) -> None:
    found = {}
    for name in CACHE_TYPES:
        context = make_context(with_cache(any_model, name))
        found[name] = np.array([read(context, n % 2, PROMPT[n : n + 30]) for n in range(4)])
    q8, q4 = (divergence(found["f16"], found[name]).max() for name in QUANTIZED)
    if any_model.metadata("general.architecture") == "mamba":
        np.testing.assert_array_equal(found["q4_0"], found["f16"])  # it has no keys and values
    else:
        assert 0 < q8 < 0.003
        assert q8 < q4 < 0.6


# What is done with it


def test_a_neighbour_and_a_batch_change_nothing(quantized: Model, make_context: MakeContext) -> None:
    context = make_context(quantized, 3)
    alone = read(context, 0, PROMPT)
    read(context, 1, END)
    context.add(0, END[:1], output=True)
    context.add(1, END[:1], output=True)
    both = context.decode().copy()
    other = make_context(quantized, 1)
    np.testing.assert_array_equal(read(other, 0, PROMPT), alone)
    assert divergence(both[0], read(other, 0, END[:1])) < 1e-3


def test_copies_and_cuts_go_on_like_what_was_read(quantized: Model, make_context: MakeContext) -> None:
    context = make_context(quantized, 3)
    read(context, 0, PROMPT)
    context.copy(0, 2)
    expected = read(context, 0, END)
    np.testing.assert_array_equal(read(context, 2, END), expected)
    if context.can_truncate:
        context.truncate(2, len(PROMPT))
        np.testing.assert_array_equal(read(context, 2, END), expected)


def test_a_saved_sequence_goes_on_bit_for_bit(quantized: Model, make_context: MakeContext) -> None:
    context = make_context(quantized, 2)
    read(context, 1, PROMPT)
    data = context.save(1)
    expected = read(context, 1, END)
    other = make_context(quantized, 2)
    other.restore(0, data, len(PROMPT))
    np.testing.assert_array_equal(read(other, 0, END), expected)
    if context.can_draft:  # and into another number of sequences
        grown = make_context(quantized, 5)
        grown.restore(3, data, len(PROMPT))
        np.testing.assert_array_equal(read(grown, 3, END), expected)


def test_a_sequence_saved_with_another_type_is_refused(
    any_model: Model, with_cache: WithCache, make_context: MakeContext
) -> None:
    contexts = {name: make_context(with_cache(any_model, name)) for name in CACHE_TYPES}
    for context in contexts.values():
        read(context, 0, PROMPT)
    for name, other in permutations(CACHE_TYPES, 2):
        data, context = contexts[name].save(0), contexts[other]
        if any_model.metadata("general.architecture") == "mamba":
            context.restore(1, data, len(PROMPT))  # its states are of no other type
            continue
        with pytest.raises(EngineError, match="could not restore"):
            context.restore(1, data, len(PROMPT))
        assert context.length(1) == 0
        read(context, 1, PROMPT)  # and it is as good as new
        context.free(1)


def test_drafts_and_preferences_write_the_same_text(tiny: Tiny, cache_type: str) -> None:
    asked = {"prefer": ["concise", "formal:0.5"], "strength": 2.5, "max_tokens": 24}
    with Amulet.load(tiny("llama"), n_ctx=512, n_threads=1, cache_type=cache_type) as amulet:
        first = amulet.generate("The old house by the sea", **asked)  # type: ignore[arg-type]
        again = amulet.generate("The old house by the sea", draft=first.text, **asked)  # type: ignore[arg-type]
        assert first.text == again.text
        messages = [{"role": "user", "content": "The old house by the sea"}]
        grown = amulet.compare(None, {"a": Settings(**asked), "b": Settings(**asked)}, messages=messages)  # type: ignore[arg-type]
        assert {answer.text for answer in grown.values()} == {first.text}


# What it takes


def test_everything_that_tells_memory_counts_the_smaller_cache(tiny: Tiny) -> None:
    path = tiny("llama")
    device = Device("Fake0", "a device of the tests", 10**10, 10**10)
    totals, on_gpu, batches = [], [], []
    for name in CACHE_TYPES:
        totals.append(estimate(path, 4096, 2, cache_type=name).total)
        on_gpu.append(offload(path, 4096, 2, [device], cache_type=name).n_bytes)
        with Model(path, cache_type=name) as model:
            record = Record(1, prompt="The old house", settings=Settings(max_tokens=1000))
            batches.append(size_batch(model, [record], n_ctx=2048).memory.cache)
    for sizes in (totals, on_gpu, batches):
        assert sizes == sorted(set(sizes), reverse=True)
    assert batches[1] / batches[0] == 34 / 64
    assert batches[2] / batches[0] == 18 / 64


# The bundled model


@pytest.mark.model
def test_real_logits_stay_near_and_text_sensible(real_model: Path) -> None:
    """Measured over 256 tokens of English: 0.005 nats with q8_0, of which flash attention alone makes
    0.0046, and 0.067 with q4_0; the best token is the same for 93 and 83 %."""
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")[:1000]
    found, written = {}, {}
    for name in CACHE_TYPES:
        with Amulet.load(real_model, n_ctx=512, cache_type=name) as amulet:
            with Context(amulet.model, n_ctx=256, n_sequences=1, n_outputs=128) as context:
                context.add(0, amulet.model.tokenize(text)[:128], output=True, n_outputs=128)
                found[name] = context.decode().copy()
            if name != "q4_0":
                written[name] = amulet.generate("How do I ask for a raise?", max_tokens=12).text
    q8, q4 = (divergence(found["f16"], found[name]) for name in QUANTIZED)
    assert 0 < q8.mean() < 0.02
    assert q8.mean() < q4.mean() < 0.3
    same = found["f16"].argmax(axis=-1) == found["q8_0"].argmax(axis=-1)
    assert same.mean() > 0.85
    assert written["q8_0"][:20] == written["f16"][:20]  # other processors round differently
