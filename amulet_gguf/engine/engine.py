"""The step: prompts are read and tokens chosen for all live generations in one decode.

Every step adds one row per branch that the next token of a generation needs, fills the rest of the batch
with prompts still to be read, decodes all of it at once, combines each generation's rows into one
distribution, samples a token, and gives that token back to all branches of its generation.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator

import numpy as np

from amulet_gguf.engine.answer import Piece
from amulet_gguf.engine.context import Context
from amulet_gguf.engine.drafts import RowTimes, Step
from amulet_gguf.engine.generation import Generation
from amulet_gguf.engine.request import Request
from amulet_gguf.engine.sequences import Sequences
from amulet_gguf.errors import AmuletError, ClosedError, EngineError, PromptTooLongError, QueueFullError
from amulet_gguf.llama.handle import closed, forget_in_child
from amulet_gguf.method.arrays import Float32Array, Tokens
from amulet_gguf.method.vocabulary import Detokenizer


class Engine:
    """Runs generations on one context.

    One thread makes the steps: for a second one, llama.cpp's OpenMP would start a second team of
    threads, and the two fight. It is the first that steps, for as long as it lives; in others, `step`
    raises EngineError, as does `stream` where it would step. The rest may be called from any thread.
    """

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
        self._sequences = Sequences(make_context, n_sequences)
        self._max_waiting = max_waiting
        self._row = np.empty(detokenizer.n_vocab, np.float32)
        self._row_times = RowTimes()
        self._waiting: deque[Generation] = deque()
        self._lock = threading.RLock()
        self._stepper: threading.Thread | None = None
        self._stepper_lock = threading.RLock()  # of its own: a step holds the other one all the time
        self._is_stepping = False  # this thread is inside `step`: a collected stream may cancel there
        forget_in_child(self)

    @property
    def n_ctx(self) -> int:
        """Tokens of prompt and answer together that a generation can have."""
        return self._sequences.context.n_ctx

    @property
    def chosen_threads(self) -> int | None:
        """CPU threads of a step that somebody chose; None: as many as are free."""
        return self._sequences.context.chosen_threads

    @property
    def n_live(self) -> int:
        """Generations that have sequences now."""
        return len(self._sequences.live)

    def close(self) -> None:
        """Cancel everything and free the context, after the step under way; from any thread."""
        self._sequences.is_closed = True  # no other step begins
        with self._lock:
            for generation in [*self._sequences.live, *self._waiting]:
                generation.fail(closed("the model was closed during the generation"))
            self._waiting.clear()
            self._sequences.close()

    def forget(self) -> None:
        """See `amulet_gguf.llama.handle.Forgetful`."""
        self._lock, self._stepper_lock = threading.RLock(), threading.RLock()
        self.close()

    def reserve(self, n_sequences: int) -> None:
        """Make room for generations with so many branches in total to run at once.

        Raises:
            EngineError: generations are live, so their context cannot be replaced, or there is not
                the memory; the old context is then as before.
        """
        with self._lock:
            self._check_open()
            self._sequences.reserve(n_sequences)

    def save(self, prompt: Tokens) -> tuple[Tokens, bytes] | None:
        """Return the longest beginning of a prompt that is cached in a free sequence, and that cache.

        What is cached there beyond it is left out, if the model can cut it. None: nothing is cached.
        """
        with self._lock:
            self._check_open()
            return self._sequences.save(prompt)

    def restore(self, tokens: Tokens, data: bytes) -> None:
        """Cache what was saved in a free sequence, for a generation that reuses it.

        Raises:
            EngineError: the data do not belong to this model, or no sequence is free.
        """
        with self._lock:
            self._check_open()
            self._sequences.restore(tokens, data)

    def submit(self, request: Request) -> Generation:
        """Queue a request; `step` or `stream` runs it.

        Raises:
            PromptTooLongError: its prompt and one token do not fit into the context.
            QueueFullError: too many are waiting.
        """
        generation = Generation(request)
        with self._lock:
            self._check_open()
            room = self.n_ctx - generation.n_prompt
            if room < 1:
                raise PromptTooLongError(generation.n_prompt, self.n_ctx)
            if request.thoughts is not None:
                generation.thought_limit = request.thoughts.limit(room, request.max_tokens)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(self._max_waiting)
            self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a generation, freeing its sequences at once. Nothing happens if it has ended."""
        with self._lock:
            generation.finish("cancelled")
            if not self._is_stepping:  # else the step itself does, when no row is under way
                if generation in self._waiting:
                    self._waiting.remove(generation)
                with contextlib.suppress(ClosedError):  # a model may end before its engine
                    self._sequences.release()

    def stream(
        self, generation: Generation, on_step: Callable[[Generation], None] | None = None
    ) -> Generator[Piece, None, None]:
        """Step the engine and yield a generation's pieces; closing the iterator cancels it.

        Args:
            on_step: called after each step that this iterator makes.

        Raises:
            AmuletError: the generation failed, or another thread makes the steps.
        """
        try:
            while True:
                # Asked first: another thread may cancel it, which adds a last piece, at any moment.
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
        self._check_thread()
        with self._lock:
            self._check_open()
            self._is_stepping = True
            try:
                self._sequences.release()
                self._admit()
                room = self._sequences.context.room
                ready = self._add_rows()
                if not self._sequences.live:
                    return False
                n_rows = room - self._sequences.context.room
                begin = time.perf_counter()
                logits = self._sequences.context.decode()
                if n_rows == len(logits):  # nothing was only read
                    self._row_times.told(n_rows, time.perf_counter() - begin)
                for generation in ready:
                    n_outputs = generation.n_outputs
                    self._advance(generation, logits[:n_outputs])
                    logits = logits[n_outputs:]
                for generation in ready:
                    generation.take_back(self._sequences.context)
                self._sequences.release()
            except BaseException as error:
                self._abandon(error)
                if not isinstance(error, AmuletError):
                    raise
            finally:
                self._is_stepping = False
            return True

    def _check_thread(self) -> None:
        """Make this thread the one that steps, or refuse it."""
        with self._stepper_lock:
            stepper, thread = self._stepper, threading.current_thread()
            if stepper is not None and stepper is not thread and stepper.is_alive():
                raise EngineError(
                    f"another thread makes the steps of this model ({stepper.name}): "
                    "use AmuletService to ask from several"
                )
            self._stepper = thread

    def _check_open(self) -> None:
        if self._sequences.is_closed:
            raise closed("the model is closed: load it again")

    def _advance(self, generation: Generation, logits: Float32Array) -> None:
        if generation.is_finished:  # cancelled since its rows were added
            return
        try:
            generation.advance(logits, self._row, self._detokenizer)
        except AmuletError as error:
            generation.fail(error)
        if generation.n_prompt + generation.n_tokens > self.n_ctx:  # no room to read the last of them
            generation.finish("length")

    def _add_rows(self) -> list[Generation]:
        """Fill the batch; return the generations that will have logits, in the order of rows."""
        context, live = self._sequences.context, self._sequences.live
        for generation in live:
            generation.split(context)
        # Those who write come first, then what is to be read before a token, prompts and what branches
        # have missed, in the order of their coming. While anyone writes, that gets half a batch: a step
        # that only reads would hold every answer up for its time.
        chunks: dict[Generation, list[int]] = {}
        budget = context.room
        reading = []
        for generation in sorted(live, key=lambda g: g.submitted_at):
            if generation.is_behind:
                reading.append(generation)
            else:
                chunks[generation] = generation.chunks(budget)
                budget -= sum(chunks[generation])
        budget -= self._fill_gaps(chunks, budget)
        if chunks and reading:
            enough = max(g.n_branches for g in reading)  # to finish with
            budget = min(budget, max(enough, context.room // 2))
        for generation in reading:
            chunks[generation] = generation.chunks(budget)
            budget -= sum(chunks[generation])
        self._guess(chunks)
        for generation in live:
            generation.add_rows(context, chunks[generation])
        return [generation for generation in live if generation.is_ready]

    def _guess(self, chunks: dict[Generation, list[int]]) -> None:
        """Have what drafts propose verified, where one answer is written alone: sequences of unequal
        numbers of rows cost llama.cpp several passes over the weights."""
        context = self._sequences.context
        if len(chunks) != 1 or not context.can_draft:
            return
        ((generation, sizes),) = chunks.items()
        if generation.is_ready:
            rows, each = sum(sizes), generation.n_outputs
            room = min(context.room - rows, context.n_outputs - each)
            generation.guess(Step(rows, each, room // each, self._row_times), context.n_ctx)

    def _fill_gaps(self, chunks: dict[Generation, list[int]], budget: int) -> int:
        """Let branches that are left behind between others read a token along; return how many do.

        Beyond a gap, llama.cpp would go through the weights again.
        """
        used = [g.first_sequence + b for g in chunks for b, size in enumerate(chunks[g]) if size]
        n_filled = 0
        for generation, sizes in chunks.items():
            if generation.is_ready:
                for branch, sequence in enumerate(generation.sequences):
                    if sizes[branch] == 0 and min(used) < sequence < max(used) and n_filled < budget:
                        sizes[branch] = 1
                        n_filled += 1
        return n_filled

    def _admit(self) -> None:
        """Seat waiting generations, first come, first served, while there is room."""
        sequences = self._sequences
        while self._waiting:
            generation = self._waiting[0]
            if generation.is_finished:  # it failed below, or an interrupt came between the two queues
                self._waiting.popleft()
                continue
            if not sequences.live:
                try:
                    sequences.reserve(generation.n_branches)
                except Exception as error:
                    if not isinstance(error, AmuletError):
                        n = generation.n_branches
                        error = EngineError(f"no context for {n} branches: {error!r}")
                    generation.fail(error)
                    continue
            if not sequences.seat(generation):
                break
            self._waiting.popleft()  # last: an interrupt must not lose it
        sequences.close_gaps()

    def _abandon(self, error: BaseException) -> None:
        """End all live generations: the context no longer holds what they think it does."""
        if not isinstance(error, AmuletError):
            error = EngineError(f"the generation was interrupted in the middle of a step ({error!r})")
        for generation in self._sequences.live:
            generation.fail(error)
        self._sequences.clear()
