"""The step: prompts are read and tokens chosen for all live generations in one decode.

Every step adds one row per branch of every generation that is writing, fills the rest of the batch
with prompts still to be read, decodes all of it at once, combines each generation's rows into one
distribution, samples a token, and gives that token back to all branches of its generation.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from itertools import pairwise

import numpy as np

from amulet_gguf.errors import AmuletError, ClosedError, EngineError, PromptTooLongError, QueueFullError
from amulet_gguf.generation import Context, Generation, Piece, Request, Vocabulary
from amulet_gguf.realign import Float32Array


class Engine:
    """Runs generations on one context. All methods may be called from any thread."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        make_context: Callable[[int], Context],
        n_sequences: int = 2,
        max_waiting: int = 1024,
    ) -> None:
        """Make the first context.

        Args:
            vocabulary: the model's.
            make_context: makes a context for a number of sequences. It is called again, when no
                generation is live, for one that needs more sequences than there are.
            n_sequences: sequences to begin with.
            max_waiting: generations that may be queued, those with sequences not counted.
        """
        self._vocabulary = vocabulary
        self._make_context = make_context
        self._context = make_context(n_sequences)
        self._max_waiting = max_waiting
        self._row = np.empty(vocabulary.n_vocab, np.float32)
        self._waiting: deque[Generation] = deque()
        self._live: list[Generation] = []  # in the order of their sequences
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
                self._context.close()  # first: two caches might not fit into memory
                try:
                    self._context = self._make_context(n_sequences)
                except BaseException:
                    self._context = self._make_context(before)
                    raise

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
            generation.advance(logits, self._row, self._vocabulary)
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
            first = self._find_gap(generation.n_branches)
            if first is None:
                break
            generation.first_sequence = first
            generation.started_at = time.perf_counter()
            self._live.append(generation)
            self._live.sort(key=lambda g: g.first_sequence)
            self._waiting.popleft()  # last: an interrupt must not lose it
        if any(a.sequences.stop != b.first_sequence for a, b in pairwise(self._live)):
            self._pack()

    def _find_gap(self, size: int) -> int | None:
        """Return where `size` neighbouring sequences are free, making such a place if need be."""
        start = 0
        for generation in self._live:
            if generation.first_sequence - start >= size:
                return start
            start = generation.sequences.stop
        if self._context.n_sequences - start >= size:
            return start
        used = sum(generation.n_branches for generation in self._live)
        if self._context.n_sequences - used >= size:
            self._pack()
            return used
        return None

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
                for sequence in generation.sequences:
                    self._context.free(sequence)
        self._live = [g for g in self._live if not g.is_finished]

    def _abandon(self, error: BaseException) -> None:
        """End all live generations: the context no longer holds what they think it does."""
        if not isinstance(error, AmuletError):
            error = EngineError(f"the generation was interrupted in the middle of a step ({error!r})")
        for generation in self._live:
            generation.fail(error)
        self._live.clear()
        if not self._is_closed:
            self._context.clear()
