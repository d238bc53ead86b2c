"""The step: prompts are read and tokens chosen for all live generations in one decode.

Every step adds one row per branch of every generation that is writing, fills the rest of the batch
with prompts still to be read, decodes all of it at once, combines each generation's rows into one
distribution, samples a token, and gives that token back to all branches of its generation.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Final

import numpy as np

from amulet_gguf.engine.answer import Piece
from amulet_gguf.engine.generation import Context, Generation, Request, common_prefix
from amulet_gguf.errors import AmuletError, ClosedError, EngineError, PromptTooLongError, QueueFullError
from amulet_gguf.method.arrays import Float32Array, Tokens
from amulet_gguf.method.vocabulary import Detokenizer

# Below this, what a sequence holds is not worth a copy of it.
_MIN_REUSED: Final = 16


class Engine:
    """Runs generations on one context. All methods may be called from any thread."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        make_context: Callable[[int], Context],
        n_sequences: int = 2,
        max_waiting: int = 1024,
    ) -> None:
        """Make the first context.

        Args:
            detokenizer: the model.
            make_context: makes a context for a number of sequences. It is called again, when no
                generation is live, for one that needs more sequences than there are.
            n_sequences: sequences to begin with.
            max_waiting: generations that may be queued, those with sequences not counted.
        """
        self._detokenizer = detokenizer
        self._make_context = make_context
        self._context = make_context(n_sequences)
        self._max_waiting = max_waiting
        self._row = np.empty(detokenizer.n_vocab, np.float32)
        self._waiting: deque[Generation] = deque()
        self._live: list[Generation] = []  # in the order of their sequences
        self._held: dict[int, Tokens] = {}  # what sequences hold that no generation has
        self._lock = threading.RLock()
        self._is_closed = False
        self._is_stepping = False  # this thread is inside `step`: a collected stream may cancel there

    @property
    def n_ctx(self) -> int:
        """Tokens of prompt and answer together that a generation can have."""
        return self._context.n_ctx

    @property
    def n_live(self) -> int:
        """Generations that hold sequences now."""
        return len(self._live)

    def close(self) -> None:
        """Cancel everything and free the context."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for generation in [*self._live, *self._waiting]:
                    generation.fail(ClosedError("the model was closed during the generation"))
                self._live.clear()
                self._waiting.clear()
                self._context.close()

    def reserve(self, n_sequences: int) -> None:
        """Make room for generations with so many branches in total to run at once.

        Raises:
            EngineError: generations are live, so their context cannot be replaced, or there is not
                the memory; the old context is then as before.
        """
        with self._lock:
            self._check_open()
            if n_sequences > self._context.n_sequences:
                if self._live:
                    raise EngineError("the context cannot grow while a generation is running")
                before = self._context.n_sequences
                kept = self._longest_held()
                self._held.clear()
                self._context.close()  # first: two caches might not fit into memory
                try:
                    self._context = self._make_context(n_sequences)
                except BaseException:
                    self._context = self._make_context(before)
                    raise
                finally:
                    with contextlib.suppress(EngineError):  # then it is read again
                        if kept is not None:
                            self._restore(0, *kept)

    def save(self, prompt: Tokens) -> tuple[Tokens, bytes] | None:
        """Return the longest beginning of a prompt that a free sequence holds, and its memory.

        What the sequence holds beyond it is left out, if the model can cut it. None: nothing of it.
        """
        with self._lock:
            self._check_open()
            found = [(self._usable(held, prompt), sequence) for sequence, held in self._held.items()]
            length, sequence = max(found, default=(0, 0))
            if length == 0:
                return None
            self._context.truncate(sequence, length)
            self._held[sequence] = prompt[:length]
            return self._held[sequence], self._context.save(sequence)

    def restore(self, tokens: Tokens, data: bytes) -> None:
        """Let a free sequence hold what was saved, for a generation that reuses it.

        Raises:
            EngineError: the data do not belong to this model, or no sequence is free.
        """
        with self._lock:
            self._check_open()
            sequence = self._find_gap(1)
            if sequence is None:
                raise EngineError("all sequences are in use: try again when a generation has ended")
            self._restore(sequence, tokens, data)

    def submit(self, request: Request) -> Generation:
        """Queue a request; `step` or `stream` runs it.

        Raises:
            PromptTooLongError: its prompt and one token do not fit into the context.
            QueueFullError: too many are waiting.
        """
        generation = Generation(request)
        with self._lock:
            self._check_open()
            if generation.n_prompt + 1 > self.n_ctx:
                raise PromptTooLongError(generation.n_prompt, self.n_ctx)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(self._max_waiting)
            self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a generation, freeing its sequences at once. Nothing happens if it has ended."""
        with self._lock:
            generation.finish("cancelled")
            if generation in self._waiting:
                self._waiting.remove(generation)
            if not self._is_stepping:  # else the step itself does, when no row is under way
                self._release()

    def stream(
        self, generation: Generation, on_step: Callable[[Generation], None] | None = None
    ) -> Generator[Piece, None, None]:
        """Step the engine and yield a generation's pieces; closing the iterator cancels it.

        Args:
            on_step: called after each step that this iterator makes.

        Raises:
            AmuletError: the generation failed.
        """
        try:
            while True:
                # Asked first: another thread's step may add the last piece at any moment.
                is_finished = generation.is_finished
                while generation.pieces:
                    yield generation.pieces.popleft()
                if is_finished:
                    if generation.error is not None:
                        raise generation.error
                    return
                self.step()
                if on_step is not None:
                    on_step(generation)
        finally:
            self.cancel(generation)

    def step(self) -> bool:
        """Decode one batch for all live generations; return whether there was anything to do.

        A generation that fails ends alone. If the decode itself fails, all that were live do.
        """
        with self._lock:
            self._check_open()
            self._is_stepping = True
            try:
                self._release()
                self._admit()
                ready = self._add_rows()
                if not self._live:
                    return False
                logits = self._context.decode()
                first = 0
                for generation in ready:
                    last = first + generation.n_branches
                    self._advance(generation, logits[first:last])
                    first = last
                self._release()
            except BaseException as error:
                self._abandon(error)
                if not isinstance(error, AmuletError):
                    raise
            finally:
                self._is_stepping = False
            return True

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the model is closed: load it again")

    def _advance(self, generation: Generation, logits: Float32Array) -> None:
        if generation.is_finished:  # cancelled since its rows were added
            return
        try:
            generation.advance(logits, self._row, self._detokenizer)
        except AmuletError as error:
            generation.fail(error)
        if not generation.is_finished and any(
            self._context.length(sequence) >= self._context.n_ctx for sequence in generation.sequences
        ):
            generation.finish("length")

    def _add_rows(self) -> list[Generation]:
        """Fill the batch; return the generations that will have logits, in the order of rows."""
        for generation in self._live:
            generation.split(self._context)
        # Those who write come first, then prompts in the order of their coming. While anyone writes,
        # prompts get half a batch: a step that is all prompt would hold every answer up for its time.
        writing = [generation for generation in self._live if generation.n_tokens > 0]
        reading = [generation for generation in self._live if generation.n_tokens == 0]
        plans = {generation: generation.plan(self._context.room) for generation in writing}
        budget = self._context.room - sum(map(sum, plans.values()))
        if writing and reading:
            enough = max(generation.n_branches for generation in reading)  # to finish a prompt with
            budget = min(budget, max(enough, self._context.room // 2))
        for generation in sorted(reading, key=lambda g: g.submitted_at):
            plans[generation] = generation.plan(budget)
            budget -= sum(plans[generation])
        return [g for g in self._live if g.add_rows(self._context, plans[g])]

    def _admit(self) -> None:
        """Give sequences to waiting generations, first come, first served, while there are any."""
        while self._waiting:
            generation = self._waiting[0]
            if generation.is_finished:  # an interrupt came between the two queues
                self._waiting.popleft()
                continue
            if generation.n_branches > self._context.n_sequences:
                if self._live:
                    break
                try:
                    self.reserve(generation.n_branches)
                except Exception as error:
                    if not isinstance(error, AmuletError):
                        error = EngineError(
                            f"no context for {generation.n_branches} branches: {error!r}"
                        )
                    generation.fail(error)
                    self._waiting.popleft()
                    continue
            first = self._find_place(generation)
            if first is None:
                break
            generation.first_sequence = first
            self._resume(generation)
            generation.started_at = time.perf_counter()
            self._live.append(generation)
            self._live.sort(key=lambda g: g.first_sequence)
            self._waiting.popleft()  # last: an interrupt must not lose it
        if any(a.sequences.stop != b.first_sequence for a, b in pairwise(self._live)):
            self._pack()

    def _find_gap(self, size: int) -> int | None:
        """Return where `size` neighbouring sequences are free, making such a place if need be."""
        taken = {sequence for generation in self._live for sequence in generation.sequences}
        starts = range(self._context.n_sequences - size + 1)
        free = [start for start in starts if taken.isdisjoint(range(start, start + size))]
        if free:  # where least is lost that could be of use again
            return min(free, key=lambda start: self._n_held(range(start, start + size)))
        used = sum(generation.n_branches for generation in self._live)
        if self._context.n_sequences - used >= size:
            self._pack()
            return used
        return None

    def _n_held(self, sequences: range) -> int:
        return sum(len(self._held[s]) for s in sequences if s in self._held)

    def _find_place(self, generation: Generation) -> int | None:
        """Return the first of the sequences for a generation, or None while there are too few."""
        if generation.request.reuse:
            source, n = self._source(generation)
            sequences = range(source, source + generation.n_branches)
            if (
                n
                and sequences.stop <= self._context.n_sequences
                and not any(set(live.sequences) & set(sequences) for live in self._live)
            ):
                return source
        return self._find_gap(generation.n_branches)

    def _usable(self, held: Tokens, prompt: Tokens) -> int:
        """Return how much of a prompt a sequence saves that holds `held`."""
        n = common_prefix(held, prompt)
        return n if n == len(held) or self._context.can_truncate else 0

    def _source(self, generation: Generation) -> tuple[int, int]:
        """Return the sequence that holds most of what a generation's branches share, and how much."""
        prompt = generation.request.branches[0]
        shared = prompt[: generation.n_shared if generation.n_branches > 1 else len(prompt) - 1]
        holdings = dict(self._held)
        for live in self._live:
            for branch, sequence in enumerate(live.sequences):
                holdings[sequence] = live.holding(branch, self._context.length(sequence))
        usable = {sequence: self._usable(held, shared) for sequence, held in holdings.items()}
        source = max(usable, key=lambda sequence: (usable[sequence], -sequence), default=0)
        n = usable.get(source, 0)
        return source, n if n >= _MIN_REUSED else 0

    def _resume(self, generation: Generation) -> None:
        """Begin with what sequences hold of the prompts already, in the way that leaves least to read.

        Either the shared prefix begins with what some sequence holds of it, or each branch with what
        its own place holds.
        """
        sequences = generation.sequences
        own, source, n = [0] * len(sequences), 0, 0
        if generation.request.reuse:
            source, n = self._source(generation)
            own = [
                self._usable(self._held[sequence], prompt[:-1]) if sequence in self._held else 0
                for sequence, prompt in zip(sequences, generation.request.branches, strict=True)
            ]
        unshared = (len(sequences) - 1) * generation.n_shared  # read again if nothing is shared
        if sum(own) - unshared > n:
            generation.skip_each(own)
        else:
            own = [n] + [0] * (len(sequences) - 1)
            if n:
                self._context.copy(source, sequences[0])
                generation.skip(n)
        for sequence, length in zip(sequences, own, strict=True):
            self._held.pop(sequence, None)
            if length:
                self._context.truncate(sequence, length)
            else:
                self._context.free(sequence)

    def _longest_held(self) -> tuple[Tokens, bytes] | None:
        if not self._held:
            return None
        sequence = max(self._held, key=lambda sequence: len(self._held[sequence]))
        return self._held[sequence], self._context.save(sequence)

    def _restore(self, sequence: int, tokens: Tokens, data: bytes) -> None:
        self._held.pop(sequence, None)
        self._context.restore(sequence, data, len(tokens))
        self._held[sequence] = tokens

    def _pack(self) -> None:
        """Move generations to the lowest sequences, leaving no gap between them.

        Rows of neighbouring sequences share one pass over the weights. A gap between them makes every
        step twice as long; a move costs one copy of a cache. So the last generation goes into a gap
        that it fits exactly, and only where there is none do all behind the gap move.
        """
        start = 0
        packed: list[Generation] = []
        rest = deque(self._live)
        while rest:
            gap = rest[0].first_sequence - start
            generation = rest.pop() if gap == rest[-1].n_branches else rest.popleft()
            if generation.first_sequence != start:
                for offset, source in enumerate(generation.sequences):
                    self._held.pop(start + offset, None)
                    self._context.copy(source, start + offset)
                    self._context.free(source)
                generation.first_sequence = start
            packed.append(generation)
            start += generation.n_branches
        self._live = packed

    def _release(self) -> None:
        """Free the sequences of generations that have ended."""
        for generation in self._live:
            if generation.is_finished:
                is_kept = generation.request.reuse and generation.error is None
                for branch, sequence in enumerate(generation.sequences):
                    length = self._context.length(sequence)
                    if is_kept and length:
                        self._held[sequence] = generation.holding(branch, length)
                    else:
                        self._context.free(sequence)
        self._live = [g for g in self._live if not g.is_finished]

    def _abandon(self, error: BaseException) -> None:
        """End all live generations: the context no longer holds what they think it does."""
        if not isinstance(error, AmuletError):
            error = EngineError(f"the generation was interrupted in the middle of a step ({error!r})")
        for generation in self._live:
            generation.fail(error)
        self._live.clear()
        self._held.clear()
        if not self._is_closed:
            self._context.clear()
