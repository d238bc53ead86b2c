"""How probable a model finds texts that it did not write: teacher forcing, many tokens a decode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from typing import Final, TypeVar

import numpy as np

from amulet_gguf.engine.generation import common_prefix
from amulet_gguf.errors import PromptTooLongError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Float32Array, Float64Array, Tokens
from amulet_gguf.method.sampling import log_sum

T = TypeVar("T")
Y = TypeVar("Y")
_BATCH: Final = 128  # rows of logits that a decode gives


class Likelihood:
    """Reads texts in a context of its own, on the thread that makes an engine's steps if there is one.

    Attributes:
        n_ctx: tokens of prompt and answer together.
    """

    def __init__(
        self, model: Model, *, n_ctx: int, n_prompts: int, n_threads: int | None = None
    ) -> None:
        """Make the context.

        Args:
            n_prompts: that are kept in its cache, the last ones.

        Raises:
            EngineError: there is not the memory.
        """
        self._context = Context(
            model,
            n_ctx=n_ctx,
            n_sequences=n_prompts + 1,
            n_batch=_BATCH,
            n_outputs=_BATCH,
            n_threads=n_threads,
        )
        self.n_ctx = self._context.n_ctx
        self._work = n_prompts  # the sequence that answers are read in
        self._prompts: OrderedDict[bytes, int] = OrderedDict()

    def __enter__(self) -> Likelihood:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def log_likelihood(self, prompt: Tokens, answer: Tokens) -> Float64Array:
        """Return log P of each token of an answer, (n,) in nats, as what follows a prompt.

        Raises:
            PromptTooLongError: together they do not fit.
        """
        return result(self.reading(prompt, answer))

    def reading(self, prompt: Tokens, answer: Tokens) -> Generator[None, None, Float64Array]:
        """As `log_likelihood`, a decode at a time: for who has others to serve between."""
        self._check(len(prompt) + len(answer))
        found = np.empty(len(answer))
        if not len(answer):
            return found
        sequence = yield from self._read(prompt[:-1])
        self._context.copy(sequence, self._work)
        inputs = np.concatenate([prompt[-1:], answer[:-1]])
        for start in range(0, len(inputs), _BATCH):
            chunk = inputs[start : start + _BATCH]
            self._context.add(self._work, chunk, output=True, n_outputs=len(chunk))
            for row, logits in enumerate(self._context.decode(), start):
                found[row] = logits[answer[row]] - log_sum(logits)
            yield
        return found

    def logits(self, prompt: Tokens) -> Float32Array:
        """Return the (V,) logits of what follows a prompt, valid until the next call.

        Raises:
            PromptTooLongError: it does not fit.
        """
        self._check(len(prompt))
        self._context.copy(result(self._read(prompt[:-1])), self._work)
        self._context.add(self._work, prompt[-1:], output=True)
        row: Float32Array = self._context.decode()[-1]
        return row

    def _check(self, n_tokens: int) -> None:
        if n_tokens > self.n_ctx:
            raise PromptTooLongError(n_tokens, self.n_ctx)

    def _read(self, prompt: Tokens) -> Generator[None, None, int]:
        """Return the sequence where a prompt is cached, reading what no other one has read."""
        name = prompt.tobytes()
        if name in self._prompts:
            self._prompts.move_to_end(name)
            return self._prompts[name]
        lengths = {
            sequence: common_prefix(np.frombuffer(other, np.int32), prompt)
            for other, sequence in self._prompts.items()
        }
        nearest = max(lengths, key=lambda sequence: lengths[sequence], default=None)
        free = set(range(self._work)).difference(self._prompts.values())
        sequence = min(free) if free else self._prompts.popitem(last=False)[1]
        start = 0
        if nearest is not None and self._context.can_truncate:
            start = lengths[nearest]
            if nearest != sequence:
                self._context.copy(nearest, sequence)
            self._context.truncate(sequence, start)
        else:
            self._context.free(sequence)
        for first in range(start, len(prompt), _BATCH):
            self._context.add(sequence, prompt[first : first + _BATCH], output=False)
            self._context.decode()
            yield
        self._prompts[name] = sequence
        return sequence


def result(work: Generator[Y, None, T], on_yield: Callable[[Y], object] = lambda _: None) -> T:
    """Do all of the work of a generator, and return what it returns.

    Args:
        on_yield: called with what it yields on the way.
    """
    while True:
        try:
            on_yield(next(work))
        except StopIteration as done:  # noqa: PERF203
            found: T = done.value
            return found
