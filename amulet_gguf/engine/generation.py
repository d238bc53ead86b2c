"""One generation: its prompts being read, and what was written after them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from amulet_gguf.engine.answer import Timings, Usage
from amulet_gguf.engine.context import Context
from amulet_gguf.engine.drafts import Step
from amulet_gguf.engine.request import Request
from amulet_gguf.engine.writing import Writing
from amulet_gguf.method.arrays import Float32Array, Tokens
from amulet_gguf.method.vocabulary import Detokenizer

# Sharing a prefix costs a copy of a whole sequence's cache; below this it is read per branch instead.
_MIN_SHARED: Final = 16


class Generation(Writing):
    """A request on its way through the engine.

    Attributes:
        mixture: of the next token that no step has begun; may be replaced by one of as many branches at
            any time.
        n_prompt: tokens of its longest prompt.
        n_prefill: tokens to read before the first token, shared prefixes once, and branches that it does
            not need not at all.
        n_read: how many of them have been read.
        is_ready: logits to sample from will come of the chunks that were made last.
        n_guessed, n_right: tokens that drafts proposed, and those of them that were chosen.
        submitted_at, started_at: seconds of `time.perf_counter`.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.mixture = request.mixture.anew()
        self.n_prompt = max(map(len, request.branches))
        self.n_read = 0
        self.submitted_at = time.perf_counter()
        self.started_at: float | None = None
        self._acting = self.mixture  # of the step under way: the other may be replaced meanwhile
        self._needed: tuple[int, ...] = ()  # of its first token
        self.is_ready = False
        self._guesses: list[int] = []
        self._n_at_once = 0  # tokens of the first step: they took no time of their own
        self._n_valid = 0  # tokens of the answer that are cached, and right
        self.n_guessed = self.n_right = 0
        self.first_sequence = -1  # its branches are neighbours from here on
        self.rewind()

    def rewind(self) -> None:
        """Have all of the prompts to read, with nothing skipped."""
        self.n_shared = _shared_prefix(self.request.branches)  # left to read in the first branch alone
        self._is_split = self.n_shared == 0
        self._n_cached = [0] * self.n_branches
        self._n_reused = 0
        self._count_prefill()

    def _count_prefill(self) -> None:
        self.n_prefill = (
            self.n_read
            + self.n_shared
            + sum(self.unread(branch) - self.n_shared for branch in self.now(self.mixture).needed)
        )

    @property
    def n_branches(self) -> int:
        return len(self.request.branches)

    @property
    def sequences(self) -> range:
        return range(self.first_sequence, self.first_sequence + self.n_branches)

    def unread(self, branch: int) -> int:
        """Return how many tokens a branch has yet to read: of its prompt, and of what was written."""
        return len(self.request.branches[branch]) + self.n_tokens - self._n_cached[branch]

    def cached(self, branch: int, length: int) -> Tokens:
        """Return what is cached of a branch: so many tokens of its prompt and of what was written."""
        return self._tokens(branch, 0, length)

    def _tokens(self, branch: int, start: int, stop: int) -> Tokens:
        prompt = self.request.branches[branch]
        n = len(prompt)
        written = np.array(self._written[max(0, start - n) : max(0, stop - n)], np.int32)
        return np.concatenate([prompt[start:stop], written]) if start < n else written

    def skip(self, n: int) -> None:
        """Leave out n tokens of the shared prefix, or of the only prompt: they are cached."""
        self._n_reused = n
        self._has_read_first(n)
        self._count_prefill()

    def skip_each(self, counts: Sequence[int]) -> None:
        """Leave out so many tokens of each branch: they are cached. Nothing is shared."""
        self._n_cached = list(counts)
        self._n_reused = max(counts)
        self.n_shared = 0
        self._is_split = True
        self._count_prefill()

    def _has_read_first(self, n: int) -> None:
        """Count n tokens of the first branch; those of the shared prefix are read for all."""
        if self.n_shared:
            self._n_cached = [cached + n for cached in self._n_cached]
            self.n_shared -= n
        else:
            self._n_cached[0] += n

    @property
    def is_behind(self) -> bool:
        """It has more to read before its next token than the last one."""
        return self.n_tokens == 0 or any(
            self.unread(branch) > 1 for branch in self.now(self.mixture).needed
        )

    def split(self, context: Context) -> None:
        """Give the prefix that was read once to all branches, when it has been read."""
        if not self._is_split and self.n_shared == 0:
            for sequence in self.sequences[1:]:
                context.copy(self.first_sequence, sequence)
            self._is_split = True

    def chunks(self, budget: int) -> list[int]:
        """Return how many tokens each branch is to read within a budget of rows.

        A branch that the next token does not need is left behind; needed again, it reads all it missed.
        Either all that are needed come to their ends together, and there will be logits to sample from,
        or each of them keeps a token for a later step.
        """
        self._acting, self._guesses = self.mixture, []
        self._needed = self.now(self._acting).needed
        if self.n_tokens == 0:  # the dial may have moved
            self._count_prefill()
        chunks = [0] * self.n_branches
        if self.n_shared:
            chunks[0] = min(self.n_shared, budget)
            self.is_ready = False
            return chunks
        unread = [self.unread(branch) for branch in self._needed]
        self.is_ready = sum(unread) <= budget
        for branch, size in zip(self._needed, unread, strict=True):
            chunks[branch] = size if self.is_ready else min(size - 1, budget)
            budget -= chunks[branch]
        return chunks

    def add_rows(self, context: Context, chunks: Sequence[int]) -> None:
        """Add so many tokens of each branch to the batch."""
        guesses = np.array(self._guesses, np.int32)
        for branch, size in enumerate(chunks):
            if size:
                sequence, start = self.first_sequence + branch, self._n_cached[branch]
                tokens = self._tokens(branch, start, start + size)
                if self.is_ready and branch in self._needed:
                    if len(guesses):
                        tokens = np.concatenate([tokens, guesses])
                    context.add(sequence, tokens, output=True, n_outputs=1 + len(guesses))
                else:
                    context.add(sequence, tokens, output=False)
        self._has_read_first(chunks[0])
        for branch in range(1, self.n_branches):
            self._n_cached[branch] += chunks[branch]
        if self.n_tokens == 0:
            self.n_read += sum(chunks)

    def guess(self, step: Step, n_ctx: int) -> None:
        """Have guesses verified in the step that is ready."""
        request = self.request
        if request.drafts is not None:
            room = n_ctx - self.n_prompt - self.n_tokens
            limit = min(step.limit, request.max_tokens - self._n_answer - 1, room)
            step = replace(step, limit=max(0, limit))
            self._guesses = request.drafts.propose(self._written, step)

    @property
    def n_outputs(self) -> int:
        """Rows of logits that the next token needs."""
        return len(self._needed) * (1 + len(self._guesses))

    def advance(self, logits: Float32Array, row: Float32Array, detokenizer: Detokenizer) -> None:
        """Choose the next token from the branches' logits, and more as long as they were guessed.

        Args:
            logits: (N * (1 + guesses), V) of the branches that are needed.
            row: (V,) work space.
        """
        places = logits.reshape(len(self._needed), -1, logits.shape[1])
        before, n_right = self.n_tokens, 0
        for place in range(places.shape[1]):
            needed = self.now(self._acting).needed
            if not set(needed) <= set(self._needed):  # it needs a branch that was not read
                break
            at = logits
            if places.shape[1] > 1 or needed != self._needed:
                at = places[[self._needed.index(branch) for branch in needed], place]
            token = self.choose(self.now(self._acting), at, row, detokenizer)
            if place < len(self._guesses) and token == self._guesses[place]:
                n_right = self.n_tokens - before  # the end of an answer is not written
            if self.is_finished or self.cut_thought(detokenizer) or n_right <= place:
                break
        self.write_forced(detokenizer)
        if before == 0:
            self._n_at_once = self.n_tokens
        if self._guesses:
            self.n_guessed += len(self._guesses)
            self.n_right += n_right
            self._n_valid = before + n_right
            if self.request.drafts is not None:
                self.request.drafts.told(n_right)

    def take_back(self, context: Context) -> None:
        """Take guesses that were wrong out of the cache again; the last token is yet to be read."""
        if not self._guesses:
            return
        n_valid = self._n_valid if self.is_finished else min(self._n_valid, self.n_tokens - 1)
        for branch in self._needed:
            length = len(self.request.branches[branch]) + n_valid
            context.truncate(self.first_sequence + branch, length)
            self._n_cached[branch] = length

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            self.n_prompt, self._n_reused, self.n_read, self.n_tokens, self.n_tokens - self._n_answer
        )

    @property
    def timings(self) -> Timings:
        """So far."""
        started = self.started_at or self.submitted_at
        first = self.first_token_at or self.finished_at or started
        decode = (self.finished_at or first) - first
        later = self.n_tokens - self._n_at_once
        rate = later / decode if decode > 0 and later > 0 else 0.0
        return Timings(started - self.submitted_at, first - started, decode, rate)


def _shared_prefix(branches: Sequence[Tokens]) -> int:
    """Return how many leading tokens to read once for all branches; each keeps one of its own."""
    if len(branches) == 1:
        return 0
    shared = min(common_prefix(branches[0][:-1], branch[:-1]) for branch in branches[1:])
    return shared if shared >= _MIN_SHARED else 0


def common_prefix(first: Tokens, second: Tokens) -> int:
    """Return how many leading tokens two sequences have in common."""
    size = min(len(first), len(second))
    same = first[:size] == second[:size]
    return size if same.all() else int(same.argmin())
