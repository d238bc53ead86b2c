"""A smaller model of the same vocabulary, which guesses what a larger one writes next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from amulet_gguf.engine.drafts import MAX_DRAFT, Source
from amulet_gguf.engine.generation import common_prefix
from amulet_gguf.errors import EngineError, SettingError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Tokens
from amulet_gguf.method.realign import argmax

_ACCEPTED: Final = 0.8  # share of guesses to expect before any was made
_PROBE: Final = 512  # steps: to guess one token, it has to read all that it has missed
_MAX_PADDING: Final = 1024  # tokens: sizes are rounded up, larger models' further
_STRIDE: Final = 61
_LEARNING: Final = 0.2  # weight of the last guesses in what one takes


def check_vocabulary(small: Model, large: Model) -> None:
    """See whether the tokens of one model are those of another; some padding at the end may differ.

    Raises:
        SettingError: they are not.
    """
    n = min(small.n_vocab, large.n_vocab)
    is_same = abs(small.n_vocab - large.n_vocab) <= _MAX_PADDING and all(
        small.token_text(token) == large.token_text(token) for token in range(0, n, _STRIDE)
    )
    if not is_same:
        raise SettingError(
            f"{small.path.name} cannot draft for {large.path.name}: their vocabularies differ. "
            "Choose a smaller model of the same family",
            "draft_model",
        )


class Drafter(Source):
    """Goes on greedily from the prompt with the preference. One serves all generations in turn."""

    def __init__(self, context: Context, n_vocab: int) -> None:
        """Guess with a model.

        Args:
            context: of the model, with one sequence that can be truncated.
            n_vocab: tokens from there on are not guessed.
        """
        super().__init__("draft model", _ACCEPTED, _PROBE)
        self._context = context
        self._n_vocab = n_vocab
        self._read = np.empty(0, np.int32)
        self._next = 0  # behind it

    def close(self) -> None:
        """Free the model."""
        self._context.close()
        self._context.model.close()

    def propose(self, prompt: Tokens, written: Sequence[int], n: int) -> list[int]:
        """Return what the model would write; nothing while it has more to read than a batch."""
        text = np.concatenate([prompt, np.array(written, np.int32)])
        if len(text) + n > self._context.n_ctx:
            return []
        begin = time.perf_counter()
        try:
            n_missed = self._catch_up(text)
            guesses = self._guess(n) if len(self._read) == len(text) else []
        except BaseException as error:  # an interrupt, too: rows may wait
            self._context.clear()
            self._read = self._read[:0]
            if not isinstance(error, EngineError):
                raise
            return []  # the answer goes on without
        if guesses and n_missed <= MAX_DRAFT + 1:
            each = (time.perf_counter() - begin) / len(guesses)
            self.seconds_each += (_LEARNING if self.seconds_each else 1.0) * (each - self.seconds_each)
        return guesses

    def _catch_up(self, text: Tokens) -> int:
        """Read what is new of a text, as far as a batch goes; return how many tokens that is."""
        kept = common_prefix(self._read, text[:-1])
        self._context.truncate(0, kept)
        self._read = self._read[:kept]
        self._add(text[kept : kept + self._context.room])
        return len(self._read) - kept

    def _add(self, tokens: Tokens) -> None:
        self._context.add(0, tokens, output=True)
        self._next = int(argmax(self._context.decode()[0]))
        self._read = np.concatenate([self._read, tokens])

    def _guess(self, n: int) -> list[int]:
        guesses: list[int] = []
        while self._next < self._n_vocab:
            guesses.append(self._next)
            if len(guesses) == n:
                break
            self._add(np.array([self._next], np.int32))
        return guesses
