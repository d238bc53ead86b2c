"""The sequences of one context: which generation has which, and what is cached in the others."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from amulet_gguf.engine.context import Context
from amulet_gguf.engine.generation import Generation, common_prefix
from amulet_gguf.errors import EngineError
from amulet_gguf.method.arrays import Tokens

# Below this, what is cached is not worth a copy of its sequence.
_MIN_REUSED: Final = 16


class Sequences:
    """Seats generations in the sequences of a context. Not safe for use by two threads at once."""

    def __init__(self, make_context: Callable[[int], Context], n_sequences: int) -> None:
        self._make_context = make_context
        self.context = make_context(n_sequences)
        self.live: list[Generation] = []  # that have sequences, in the order of these
        self.is_closed = False
        self._has_restored = False
        self._cached: dict[int, Tokens] = {}  # what is in sequences that no generation has

    def close(self) -> None:
        self.is_closed = True
        self.live.clear()
        self.context.close()

    def clear(self) -> None:
        """Empty all sequences, whatever is in them."""
        self.live.clear()
        self._cached.clear()
        if not self.is_closed:
            self.context.clear()

    def reserve(self, n_sequences: int) -> None:
        """See `Engine.reserve`. The longest of what is cached moves to the new context."""
        if n_sequences <= self.context.n_sequences:
            return
        if self.live:
            raise EngineError("the context cannot grow while a generation is running")
        before = self.context.n_sequences
        longest = max(self._cached.values(), key=len, default=None)
        kept = None if longest is None else self.save(longest)
        self._cached.clear()
        self.context.close()  # first: two caches might not fit into memory
        try:
            self.context = self._make_context(n_sequences)
        except BaseException:
            self.context = self._make_context(before)
            raise
        finally:
            with contextlib.suppress(EngineError):  # then it is read again
                if kept is not None:
                    self.restore(*kept)

    def save(self, prompt: Tokens) -> tuple[Tokens, bytes] | None:
        """See `Engine.save`."""
        found = [(self._usable(cached, prompt), sequence) for sequence, cached in self._cached.items()]
        length, sequence = max(found, default=(0, 0))
        if length < _MIN_REUSED:  # not worth what would be cut off behind it
            return None
        self.context.truncate(sequence, length)
        self._cached[sequence] = prompt[:length]
        return self._cached[sequence], self.context.save(sequence)

    def restore(self, tokens: Tokens, data: bytes) -> None:
        """See `Engine.restore`."""
        sequence = self._find_place(1)
        if sequence is None:
            raise EngineError("all sequences are in use: try again when a generation has ended")
        self._cached.pop(sequence, None)
        self._has_restored = True
        self.context.restore(sequence, data, len(tokens))
        self._cached[sequence] = tokens

    def seat(self, generation: Generation) -> bool:
        """Give sequences to a generation, if so many are free; return whether they are."""
        generation.rewind()  # an earlier try may have failed or been interrupted
        source, n = self._source(generation)
        first = self._find_place(generation.n_branches, source if n else None)
        if first is None:
            return False
        generation.first_sequence = first
        self._resume(generation)
        generation.started_at = time.perf_counter()
        self.live.append(generation)
        self.live.sort(key=lambda g: g.first_sequence)
        return True

    def release(self) -> None:
        """Take the sequences back from generations that have ended; what is of use stays cached."""
        ended = [g for g in self.live if g.is_finished]
        for generation in ended:
            is_kept = generation.request.reuse and generation.error is None
            for branch, sequence in enumerate(generation.sequences):
                length = self.context.length(sequence)
                if is_kept and length:
                    self._cached[sequence] = generation.cached(branch, length)
                else:
                    self.context.free(sequence)
        self.live = [g for g in self.live if g not in ended]  # more may have ended meanwhile

    def close_gaps(self) -> None:
        """Move generations together if a gap is between two: every step would take twice as long."""
        if any(a.sequences.stop != b.first_sequence for a, b in pairwise(self.live)):
            self._pack()

    def _pack(self) -> None:
        """Move generations to the lowest sequences, leaving no gap between them.

        Rows of neighbouring sequences share one pass over the weights; a move costs one copy of a cache.
        So the last generation goes into a gap that it fits exactly, and only where there is none do all
        behind the gap move.
        """
        start = 0
        packed: list[Generation] = []
        rest = deque(self.live)
        while rest:
            gap = rest[0].first_sequence - start
            generation = rest.pop() if gap == rest[-1].n_branches else rest.popleft()
            if generation.first_sequence != start:
                for offset, source in enumerate(generation.sequences):
                    self._cached.pop(start + offset, None)
                    self.context.copy(source, start + offset)
                    self.context.free(source)
                generation.first_sequence = start
            packed.append(generation)
            start += generation.n_branches
        self.live = packed

    def _find_place(self, size: int, wanted: int | None = None) -> int | None:
        """Return where so many neighbours are free (`wanted`, if they are), making room if need be."""
        taken = {sequence for generation in self.live for sequence in generation.sequences}
        starts = range(self.context.n_sequences - size + 1)
        free = [start for start in starts if taken.isdisjoint(range(start, start + size))]
        if wanted in free:
            return wanted
        if free:  # where least is lost that could be of use again
            sizes = [len(self._cached.get(sequence, ())) for sequence in range(free[-1] + size)]
            return min(free, key=lambda start: sum(sizes[start : start + size]))
        if self.context.n_sequences - len(taken) >= size:
            self._pack()
            return len(taken)
        return None

    def _usable(self, cached: Tokens, prompt: Tokens) -> int:
        """Return how much of a prompt need not be read where `cached` is."""
        n = common_prefix(cached, prompt)
        # What was saved of a sliding window lacks the cells behind it: it cannot be cut any more.
        can_cut = self.context.can_truncate and (self.context.can_draft or not self._has_restored)
        return n if n == len(cached) or can_cut else 0

    def _source(self, generation: Generation) -> tuple[int, int]:
        """Return where most is cached of what a generation's branches share, and how much (0: none)."""
        if not generation.request.reuse:
            return 0, 0
        prompt = generation.request.branches[0]
        shared = prompt[: generation.n_shared if generation.n_branches > 1 else len(prompt) - 1]
        caches = dict(self._cached)
        for live in self.live:
            for branch, sequence in enumerate(live.sequences):
                caches[sequence] = live.cached(branch, self.context.length(sequence))
        found = [(self._usable(cached, shared), -sequence) for sequence, cached in caches.items()]
        n, source = max(found, default=(0, 0))
        return -source, n if n >= _MIN_REUSED else 0

    def _resume(self, generation: Generation) -> None:
        """Begin with what is cached of the prompts, in the way that leaves least to read.

        Either the shared prefix begins with what is cached of it anywhere, or each branch with what is
        cached in its own place.
        """
        sequences, request = generation.sequences, generation.request
        source, n = self._source(generation)
        own = [
            self._usable(self._cached.get(sequence, prompt[:0]), prompt[:-1]) if request.reuse else 0
            for sequence, prompt in zip(sequences, request.branches, strict=True)
        ]
        unshared = (len(sequences) - 1) * generation.n_shared  # read again if nothing is shared
        if sum(own) - unshared > n:
            generation.skip_each(own)
        else:
            own = [n] + [0] * (len(sequences) - 1)
            if n:
                self.context.copy(source, sequences[0])
                generation.skip(n)
        for sequence, length in zip(sequences, own, strict=True):
            self._cached.pop(sequence, None)
            if length:
                self.context.truncate(sequence, length)
            else:
                self.context.free(sequence)
