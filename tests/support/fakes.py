"""Stand-ins for `llama.Model` and `llama.Context`, strict about how the engine must use them.

The logits after a sequence are a pure function of the tokens it holds, so that what an engine writes
can be worked out with a loop of five lines (`alone`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from amulet_gguf.engine.drafts import Drafts
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import EngineError
from amulet_gguf.method.mixture import Mixture
from amulet_gguf.method.sampling import PLAIN, Sampler

Tokens = npt.NDArray[np.int32]
Rows = npt.NDArray[np.float32]

END = 0  # the token that ends an answer
POISON = 1  # after it, logits hold NaN
# "é" is spread over two tokens, and "abc" over one, two or three.
BYTES = [b"", b"!", b"\xc3", b"\xa9", b"a", b"b", b"c", b"ab", b"bc", b" ", b"d", b"e"]
N_VOCAB = len(BYTES)


def logits_after(tokens: Sequence[int]) -> Rows:
    """(V,) logits of a sequence."""
    row = np.random.default_rng(zlib.crc32(bytes(tokens))).normal(size=N_VOCAB).astype(np.float32)
    row[END] -= 1.7  # answers of about ten tokens
    row[POISON] = np.nan if tokens[-1] == POISON else -9.0
    return row


class FakeVocabulary:
    n_vocab = N_VOCAB

    def token_bytes(self, token: int) -> bytes:
        return BYTES[token]

    def ends_generation(self, token: int) -> bool:
        return token == END


@dataclass
class FakeContext:
    """Refuses what `llama.Context` refuses, and batches that would cost a pass over the weights more.

    Attributes:
        held: the tokens of each sequence.
        batches: (sequence, rows) of each decode so far.
        error: raised by the next decode, once.
    """

    n_sequences: int
    n_ctx: int = 64
    n_batch: int = 12
    batches: list[list[tuple[int, int]]] = field(default_factory=list)
    error: BaseException | None = None
    is_closed: bool = False
    can_truncate: bool = True
    chosen_threads: int | None = None
    n_outputs: int = 16

    def __post_init__(self) -> None:
        assert 1 <= self.n_sequences <= self.n_batch
        self.held: list[list[int]] = [[] for _ in range(self.n_sequences)]
        self._added: list[tuple[int, int, int]] = []

    @property
    def room(self) -> int:
        return self.n_batch - sum(n for _, n, _ in self._added)

    def length(self, sequence: int) -> int:
        return len(self.held[sequence])

    @property
    def can_draft(self) -> bool:
        return self.can_truncate

    def add(self, sequence: int, tokens: Tokens, *, output: bool, n_outputs: int = 1) -> None:
        assert not self.is_closed
        assert 0 <= sequence < self.n_sequences
        assert not self._added or self._added[-1][0] < sequence
        assert 1 <= len(tokens) <= self.room
        assert len(self.held[sequence]) + len(tokens) <= self.n_ctx
        self.held[sequence] += tokens.tolist()
        assert 1 <= n_outputs <= len(tokens)
        self._added.append((sequence, len(tokens), n_outputs if output else 0))
        assert sum(n for _, _, n in self._added) <= self.n_outputs

    def decode(self) -> Rows:
        assert not self.is_closed
        added, self._added = self._added, []
        assert added
        self.batches.append([(sequence, n) for sequence, n, _ in added])
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        outputs = [sequence for sequence, _, n in added if n]
        # All write: their rows must be those of neighbours. (A prompt that ends here may lie apart: one
        # between may have had no room in this batch.)
        if len(outputs) == len(added) and all(n == 1 for _, n, _ in added):
            assert outputs == list(range(outputs[0], outputs[0] + len(outputs)))
        rows = [
            logits_after(self.held[sequence][: len(self.held[sequence]) - back])
            for sequence, _, n in added
            for back in range(n - 1, -1, -1)
        ]
        return np.array(rows, np.float32).reshape(len(rows), N_VOCAB)

    def truncate(self, sequence: int, length: int) -> None:
        assert not self.is_closed
        assert not self._added
        assert self.can_truncate or length in (0, len(self.held[sequence]))
        assert 0 <= length <= len(self.held[sequence])
        del self.held[sequence][length:]

    def save(self, sequence: int) -> bytes:
        assert not self.is_closed
        assert not self._added
        return bytes(self.held[sequence])

    def restore(self, sequence: int, data: bytes, length: int) -> None:
        assert not self.is_closed
        assert len(data) == length <= self.n_ctx
        self.held[sequence] = list(data)

    def copy(self, source: int, target: int) -> None:
        assert not self.is_closed
        assert not self._added
        self.held[target] = list(self.held[source])

    def free(self, sequence: int) -> None:
        assert not self.is_closed
        assert all(sequence != added for added, _, _ in self._added)
        self.held[sequence] = []

    def clear(self) -> None:
        assert not self.is_closed
        self.held = [[] for _ in range(self.n_sequences)]
        self._added = []

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Contexts:
    """Makes the contexts of an engine and keeps them; cannot make more than `limit` sequences."""

    n_ctx: int = 64
    n_batch: int = 12
    limit: int = 8
    made: list[FakeContext] = field(default_factory=list)

    def __call__(self, n_sequences: int) -> FakeContext:
        assert all(context.is_closed for context in self.made), "two contexts may not fit into memory"
        if n_sequences > self.limit:
            raise EngineError("no memory for that many sequences")
        self.made.append(FakeContext(n_sequences, self.n_ctx, self.n_batch))
        return self.made[-1]

    @property
    def current(self) -> FakeContext:
        return self.made[-1]


def mixture(n_branches: int, strength: float, plausibility: float = 0.0) -> Mixture:
    """The strength shared out evenly."""
    others = n_branches - 1
    if not others:
        return Mixture([1.0], [1.0], plausibility)
    return Mixture(
        [1 - strength, *[strength / others] * others], [0.0, *[1 / others] * others], plausibility
    )


def request(
    branches: Sequence[Sequence[int]],
    *,
    strength: float = 3.0,
    plausibility: float = 0.0,
    max_tokens: int = 20,
    stop: Sequence[str] = (),
    seed: int | None = None,
    reuse: bool = False,
    drafts: Drafts | None = None,
) -> Request:
    """A request with the strength shared out evenly; greedy without a seed."""
    return Request(
        branches=[np.array(branch, np.int32) for branch in branches],
        mixture=mixture(len(branches), strength, plausibility),
        sampler=Sampler(PLAIN.replace(temperature=0.0 if seed is None else 1.5, seed=seed)),
        max_tokens=max_tokens,
        stop=stop,
        reuse=reuse,
        drafts=drafts,
    )


def alone(
    asked: Request,
    seed: int | None = None,
    n_ctx: int = 64,
    turns: Sequence[tuple[int, Mixture]] = (),
) -> tuple[list[int], str]:
    """What a request writes, and why it ends, by a loop that knows nothing of an engine.

    Args:
        turns: mixtures that took its mixture's place, each with the number of its first token.
    """
    sampler = Sampler(PLAIN.replace(temperature=0.0 if seed is None else 1.5, seed=seed))
    held = [branch.tolist() for branch in asked.branches]
    written: list[int] = []
    while True:
        rows = np.array([logits_after(tokens) for tokens in held], np.float64)
        acting = [asked.mixture, *(each for first, each in turns if first <= len(written))][-1]
        mixed = sum(weight * row for weight, row in zip(acting.coefficients, rows, strict=True))
        judged = sum(weight * row for weight, row in zip(acting.reference, rows, strict=True))
        if min(acting.coefficients) < 0:  # a mean is not guarded
            mixed[judged < judged.max() + acting.margin] = -np.inf
        token = sampler.sample(mixed.astype(np.float32))
        if token == END:
            return written, "stop"
        written.append(token)
        if any(stop in text_of(written) for stop in asked.stop):
            return written, "stop"
        if len(written) == asked.max_tokens or max(map(len, held)) == n_ctx:
            return written, "length"
        for tokens in held:
            tokens.append(token)


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(BYTES[token] for token in tokens).decode("utf-8", "replace")
