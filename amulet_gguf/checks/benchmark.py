"""Measuring what a step costs: the parts of `amulet bench`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
import psutil

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.answer import Kind
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.generation import Generation
from amulet_gguf.engine.request import Request, ThoughtRule
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.memory import cache_bytes
from amulet_gguf.llama.model import Model
from amulet_gguf.method.mixture import Mixture, coefficients
from amulet_gguf.method.realign import combine
from amulet_gguf.method.sampling import PLAIN, Sampler
from amulet_gguf.settings import PAPER_STRENGTH

_DEPTH: Final = 128  # tokens in each sequence when the measured steps begin
_PREFILL: Final = 512
_THOUGHT_CTX: Final = 512
_LARGE_VOCAB: Final = 151_936  # Qwen's, among the largest in use


@dataclass(frozen=True)
class KernelTimes:
    """Medians in milliseconds for two rows of V logits."""

    n_vocab: int
    combine_ms: float
    combine_sample_ms: float


@dataclass(frozen=True)
class BenchResult:
    """Medians. Times of kernels are for the model's own vocabulary, `large` for one of 151,936.

    Attributes:
        plain_step_ms: `llama_decode` of one row.
        raw_step_ms: `llama_decode` of two rows in two sequences, and nothing else.
        aligned_step_ms: a whole step of the engine with one preference: two rows, combined, sampled
            greedily, turned into text.
        thought_step_ms: a whole step of the engine in a thought: one row of the two branches.
        combine_ms: `combine` with plausibility 0.1.
        combine_sample_ms: `combine` without mask, then temperature 0.8 and top-p 0.95.
        prefill_tokens_per_s: of a prompt of 512 tokens (or what fits) in one sequence.
        resident_bytes: of the process after a generation with one preference.
        model_bytes, cache_bytes: of the file, and of the KV cache (two sequences).
    """

    model: str
    n_vocab: int
    n_ctx: int
    threads: int
    rounds: int
    plain_step_ms: float
    raw_step_ms: float
    aligned_step_ms: float
    thought_step_ms: float
    combine_ms: float
    combine_sample_ms: float
    prefill_tokens_per_s: float
    resident_bytes: int
    model_bytes: int
    cache_bytes: int
    large: KernelTimes

    def table(self) -> list[tuple[str, str, str]]:
        """Return rows of name, median and ratio for people."""
        overhead = self.resident_bytes - self.model_bytes - self.cache_bytes
        own = KernelTimes(self.n_vocab, self.combine_ms, self.combine_sample_ms)
        rows = [
            ("plain step (one row)", f"{self.plain_step_ms:.2f} ms", ""),
            (
                "raw step (two rows, llama_decode alone)",
                f"{self.raw_step_ms:.2f} ms",
                f"{self.raw_step_ms / self.plain_step_ms:.2f} × plain",
            ),
            (
                "aligned step (all of it)",
                f"{self.aligned_step_ms:.2f} ms",
                f"{self.aligned_step_ms / self.raw_step_ms:.3f} × raw, "
                f"{self.aligned_step_ms / self.plain_step_ms:.2f} × plain",
            ),
            (
                "step of a thought (all of it)",
                f"{self.thought_step_ms:.2f} ms",
                f"{self.thought_step_ms / self.plain_step_ms:.3f} × plain",
            ),
        ]
        for times in (own, self.large):
            rows += [
                (f"combine, V = {times.n_vocab:,}", f"{times.combine_ms:.3f} ms", ""),
                (
                    f"combine + top-p sampling, V = {times.n_vocab:,}",
                    f"{times.combine_sample_ms:.3f} ms",
                    "",
                ),
            ]
        rows += [
            ("prefill", f"{self.prefill_tokens_per_s:.0f} tokens/s", ""),
            (
                "memory",
                f"{self.resident_bytes / 1e6:.0f} MB",
                f"model {self.model_bytes / 1e6:.0f} + KV {self.cache_bytes / 1e6:.0f} "
                f"+ {overhead / 1e6:.0f}",
            ),
        ]
        return rows


def measure(
    amulet: Amulet, rounds: int, progress: Callable[[float, float], None] = lambda done, total: None
) -> BenchResult:
    """Measure with a loaded model.

    Args:
        amulet: with a context of at least 512 tokens, and a chosen number of threads: those that follow
            what is free would not be the same in all kinds of steps.
        rounds: measurements of each kind.
        progress: called with the rounds done and in all.
    """
    model, engine = amulet.model, amulet.engine
    amulet.generate("Hello", prefer="concise", max_tokens=8)
    resident = psutil.Process().memory_info().rss

    n_ctx = engine.n_ctx
    with ExitStack() as stack:
        # Each kind of step has a context of its own: in one, a GPU's graph would be made anew at each.
        one, two = (
            stack.enter_context(
                Context(model, n_ctx=n_ctx, n_sequences=n, n_threads=engine.chosen_threads)
            )
            for n in (1, 2)
        )
        steps = _Steps(model, engine, one, two)
        times = []
        for done in range(-2, rounds):  # the first two warm up
            row = steps.plain(), steps.raw(), steps.aligned(), steps.thought()
            if done >= 0:
                times.append(row)
                progress(done + 1, rounds)
        plain, raw, aligned, thought = map(_median_ms, zip(*times, strict=True))
        steps.close()
        prefill = [_prefill(one, min(_PREFILL, n_ctx - 1)) for _ in range(3)]
        threads = one.n_threads
    own, large = (_kernels(n_vocab, rounds) for n_vocab in (model.n_vocab, _LARGE_VOCAB))
    return BenchResult(
        model=model.path.name,
        n_vocab=model.n_vocab,
        n_ctx=n_ctx,
        threads=threads,
        rounds=rounds,
        plain_step_ms=plain,
        raw_step_ms=raw,
        aligned_step_ms=aligned,
        thought_step_ms=thought,
        combine_ms=own.combine_ms,
        combine_sample_ms=own.combine_sample_ms,
        prefill_tokens_per_s=statistics.median(prefill),
        resident_bytes=resident,
        model_bytes=model.path.stat().st_size,
        cache_bytes=cache_bytes(model.header, n_ctx, 2, model.cache_type),
        large=large,
    )


class _Steps:
    """Steps of three kinds, all at the same depth of context."""

    def __init__(self, model: Model, engine: Engine, one: Context, two: Context) -> None:
        self._engine = engine
        self._one = one
        self._two = two
        self._tokens = _some_tokens(model, _DEPTH)
        self._generation = self._begin(engine, None)
        n_ctx, n_threads = min(_THOUGHT_CTX, engine.n_ctx), engine.chosen_threads
        self._thinking = Engine(
            model, lambda n: Context(model, n_sequences=n, n_ctx=n_ctx, n_threads=n_threads)
        )
        self._thought = self._begin(self._thinking, _THINKS)

    def _begin(self, engine: Engine, thoughts: ThoughtRule | None) -> Generation:
        generation = engine.submit(dataclasses.replace(self._request(), thoughts=thoughts))
        while generation.n_tokens == 0 and not generation.is_finished:
            engine.step()
        return generation

    def _request(self) -> Request:
        weights = coefficients([1.0], PAPER_STRENGTH)
        return Request(
            [self._tokens, self._tokens[::-1].copy()],
            Mixture(weights, (0.0, 1.0), 0.1),
            Sampler(),
            10**6,
        )

    def _decode(self, context: Context) -> float:
        sequences = range(context.n_sequences)
        for sequence in sequences:
            if context.length(sequence) in (0, context.n_ctx):
                context.free(sequence)
                _read(context, sequence, self._tokens)
        for sequence in sequences:
            context.add(sequence, self._tokens[:1], output=True)
        begin = time.perf_counter()
        context.decode()
        return time.perf_counter() - begin

    def plain(self) -> float:
        return self._decode(self._one)

    def raw(self) -> float:
        return self._decode(self._two)

    def aligned(self) -> float:
        if self._generation.is_finished:  # by an end of text, say
            self._generation = self._begin(self._engine, None)
        return _time(self._engine.step)

    def thought(self) -> float:
        if self._thought.is_finished or self._thought.thought_limit == 0:  # it came to an end
            self._thinking.cancel(self._thought)
            self._thought = self._begin(self._thinking, _THINKS)
        return _time(self._thinking.step)

    def close(self) -> None:
        self._engine.cancel(self._generation)
        self._thinking.close()


class _Always:
    """Whatever is written is a thought."""

    state: Final = "thought"
    has_thought: Final = True
    holds: Final = False
    opening: Final = ()

    def anew(self) -> _Always:
        return self

    def may_open(self, token: int) -> bool:
        return False

    def push(self, token: int) -> list[tuple[Kind, bytes]]:
        return []

    def end(self) -> list[tuple[Kind, bytes]]:
        return []

    def settle(self) -> None:
        pass


_THINKS: Final = ThoughtRule(_Always(), Mixture((0.0, 1.0), (0.0, 1.0)), None, ())


def _kernels(n_vocab: int, rounds: int) -> KernelTimes:
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (2, n_vocab)).astype(np.float32)
    logits[:, : n_vocab // 1000] += 10  # a nucleus, as language models have
    weights = coefficients([1.0], PAPER_STRENGTH)
    out = np.empty(n_vocab, np.float32)
    sampler = Sampler(PLAIN.replace(temperature=0.8, top_p=0.95, seed=0))

    def combine_and_sample() -> None:
        combine(logits, weights, out=out)
        sampler.sample(out)

    def median(function: Callable[[], object], repeats: int) -> float:
        function()
        return _median_ms([_time(function) for _ in range(repeats)])

    return KernelTimes(
        n_vocab,
        median(lambda: combine(logits, weights, 0.1, out=out), 10 * rounds),
        median(combine_and_sample, 10 * rounds),
    )


def _time(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1000


def _prefill(context: Context, n_tokens: int) -> float:
    """Return tokens per second of reading a prompt."""
    context.clear()
    tokens = _some_tokens(context.model, n_tokens)
    return n_tokens / _time(lambda: _read(context, 0, tokens))


def _read(context: Context, sequence: int, tokens: np.typing.NDArray[np.int32]) -> None:
    """Append a prompt to a sequence; the logits after it are asked for, so that a GPU is waited for."""
    for start in range(0, len(tokens), context.n_batch):
        part = tokens[start : start + context.n_batch]
        context.add(sequence, part, output=start + len(part) == len(tokens))
        context.decode()


def _some_tokens(model: Model, n_tokens: int) -> np.typing.NDArray[np.int32]:
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, n_tokens)
    return tokens.astype(np.int32)
