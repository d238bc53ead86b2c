"""What an answer is likely to say next, so that several tokens can be verified in one step.

A draft is never believed: the engine chooses each token from its own distribution, as without drafts,
and goes on as long as the draft has guessed it. Guesses come from texts at hand, where what followed
the last tokens before is proposed to follow them again, or from a smaller model
(`amulet_gguf.engine.drafter`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from amulet_gguf.method.arrays import Tokens

#: Tokens that one step verifies at most.
MAX_DRAFT: Final = 7
#: Rows of logits that a context makes for them; each takes V * 4 bytes.
N_OUTPUTS: Final = 2 * (1 + MAX_DRAFT)
_MIN_MATCH: Final = 3  # tokens: after fewer, what followed before seldom follows again
_MAX_MATCH: Final = 8  # tokens: a longer match says no more
_MEMORY: Final = 0.8  # of what share was accepted, per draft
_PROBE: Final = 32  # tokens after which a source that was wrong may guess one again
_MAX_ROWS: Final = 16
#: Of 1, 2, 4, 8 and 16 rows, as a CPU of two cores had them with 0.5 and 1.5 billion parameters.
_TYPICAL: Final = (1.0, 1.75, 2.45, 4.2, 6.3)
_MEMORY_OF_TIMES: Final = 0.98  # of what steps took, per step
_GAIN: Final = 0.2  # of what the last steps took
_MAX_LONGER: Final = 8.0  # times what a step takes usually
_FORGETTING: Final = 0.999  # of what going back takes, per step without
_MAX_POWER: Final = 4.0  # beyond it, a step was slow by chance
_DOUBT: Final = 0.01  # that a machine differs: as a variance of log times


class RowTimes:
    """What steps of 1 to 16 rows take, relative to each other: learned from the steps that are made.

    Machines differ: a GPU gives rows away, a CPU hardly does. A power of what a CPU takes is fitted to
    the logarithms of times, the last ones counting most, with a prior that the power is 1. But a GPU's
    graph is made anew for other rows, and captured at the step after: who goes back to fewer pays that.
    """

    def __init__(self) -> None:
        """Begin with what a CPU takes."""
        sizes = np.log2(np.arange(1, _MAX_ROWS + 1))
        self._log_typical = np.log(np.interp(sizes, np.arange(5), _TYPICAL))
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._power = 1.0
        self._last = 0  # rows of the last step; 0: there was none
        self._n_same = 0  # steps since that had so many,
        self._is_back = False  # after steps of more
        self._back = [0.0, 0.0]  # seconds, of late, that the first two of those took longer
        self._usual, self._usual_rows = 0.0, 0  # seconds, of late, of those that follow

    def __getitem__(self, rows: int) -> float:
        return float(np.exp(self._power * self._log_typical[rows - 1]))

    def relative(self, seconds: float) -> float:
        """Return how many steps of one row take so long; 0 while that is not known."""
        one = math.exp(self._y - self._power * self._x)
        return seconds / one if self._weight else 0.0

    def way_back(self, rows: int, rows_without: int) -> float:
        """Return what going back to steps without guesses takes, in steps of one row, if there are
        guesses in this one or were in the last."""
        is_away = rows != rows_without or self._last > rows_without
        return is_away * self.relative(sum(max(0.0, seconds) for seconds in self._back))

    def told(self, rows: int, seconds: float) -> None:
        """Learn what a step of so many rows took; of more than 16 nothing is learned."""
        if rows != self._last:
            self._n_same, self._is_back, self._last = 0, rows < self._last, rows
        n_same, self._n_same = self._n_same, self._n_same + 1
        if not 1 <= rows <= _MAX_ROWS or seconds <= 0:
            return
        x = float(self._log_typical[rows - 1])
        if n_same >= len(self._back):
            usual = self._usual if rows == self._usual_rows else seconds
            self._usual, self._usual_rows = usual + _GAIN * (seconds - usual), rows
            self._back = [_FORGETTING * longer for longer in self._back]
        elif self._is_back and rows == self._usual_rows:
            longer = min(seconds - self._usual, _MAX_LONGER * self._usual)  # or chance slowed it down
            self._back[n_same] += _GAIN * (longer - self._back[n_same])
            seconds = max(seconds - max(0.0, self._back[n_same]), seconds / 4)
        y = math.log(seconds)
        gain = 1 / (1 + _MEMORY_OF_TIMES * self._weight)
        self._weight = 1 + _MEMORY_OF_TIMES * self._weight
        self._x += gain * (x - self._x)
        self._y += gain * (y - self._y)
        self._xx += gain * (x * x - self._xx)
        self._xy += gain * (x * y - self._xy)
        spread = self._xx - self._x**2 + _DOUBT
        power = (self._xy - self._x * self._y + _DOUBT) / spread
        self._power = min(max(0.0, power), _MAX_POWER)


@dataclass(frozen=True)
class Step:
    """What guesses would come to.

    Attributes:
        rows: of the step without them.
        rows_each: that a guess adds.
        limit: guesses that there is room for.
        times: of steps, by their rows.
    """

    rows: int
    rows_each: int
    limit: int
    times: RowTimes = field(default_factory=RowTimes)


class Source(ABC):
    """Somebody who guesses.

    Attributes:
        name: for people.
        accepted: share of guesses that were right, of late.
        n_guessed, n_right: tokens, of all.
        n_silent: steps since it guessed.
        probe: steps after which it may guess one token, though it was wrong.
        seconds_each: that a guess takes.
    """

    def __init__(self, name: str, accepted: float, probe: int) -> None:
        self.name = name
        self.accepted = accepted
        self.probe = probe
        self.seconds_each = 0.0
        self.n_silent = 0
        self.n_guessed = self.n_right = 0

    @abstractmethod
    def propose(self, prompt: Tokens, written: Sequence[int], n: int) -> list[int]:
        """Return at most n tokens, n >= 1, that may follow what was written to a prompt."""

    def told(self, proposed: int, accepted: int) -> None:
        """Learn how many tokens of a draft were right."""
        self.n_guessed += proposed
        self.n_right += accepted
        tried = min(proposed, accepted + 1)
        self.accepted = _MEMORY * self.accepted + (1 - _MEMORY) * accepted / tried


class TextSource(Source):
    """A text in which an answer may find itself again."""

    def __init__(
        self, name: str, text: Tokens, *, min_match: int, accepted: float, is_answer: bool = False
    ) -> None:
        """Look tokens up in a text.

        Args:
            text: (n,) int32.
            min_match: tokens, at least 1, that must be the same before what follows is a guess.
            accepted: share of guesses to expect before any was made.
            is_answer: its beginning is a guess for the beginning.
        """
        super().__init__(name, accepted, _PROBE)
        self._text = text
        self._min_match = min_match
        self._is_answer = is_answer

    def propose(self, prompt: Tokens, written: Sequence[int], n: int) -> list[int]:
        """Return what followed the last tokens before; nothing without a match.

        Of several matches the longest counts, and of those the last.
        """
        if not written:
            return self._text[:n].tolist() if self._is_answer else []
        text = self._text
        ends = np.flatnonzero(text[:-1] == written[-1])
        best, best_size = -1, self._min_match - 1
        for end in ends[::-1].tolist():
            size = 1
            while (
                size < min(_MAX_MATCH, len(written), end + 1) and text[end - size] == written[-1 - size]
            ):
                size += 1
            if size > best_size:
                best, best_size = end, size
                if size == _MAX_MATCH:
                    break
        return text[best + 1 : best + 1 + n].tolist() if best >= 0 else []


def best_size(accepted: float, step: Step, seconds_each: float = 0.0) -> int:
    """Return how many guesses to verify in a step: what writes most tokens in a time; 0 if none does.

    Args:
        accepted: probability of each guess.
        seconds_each: that it takes to make one.
    """
    # Beyond, a prompt is read, and nobody knows what more would cost.
    most = min(MAX_DRAFT, step.limit, (_MAX_ROWS - step.rows) // step.rows_each)
    if most < 1:
        return 0

    each = step.times.relative(seconds_each)

    def rate(k: int) -> float:
        tokens = sum(accepted**i for i in range(k + 1))
        rows = step.rows + k * step.rows_each
        return tokens / (step.times[rows] + step.times.way_back(rows, step.rows) + k * each)

    return max(range(most + 1), key=rate)


class Drafts:
    """The guesses of one generation.

    Attributes:
        sources: of guesses, in the order in which they are asked.
    """

    def __init__(self, prompt: Tokens, sources: Sequence[Source]) -> None:
        """Ask sources in their order what follows a prompt."""
        self._prompt = prompt
        self.sources = sources
        self._asked: Source | None = None
        self._n_proposed = 0

    @classmethod
    def of(cls, prompt: Tokens, answer: Tokens | None, others: Sequence[Source] = ()) -> Drafts:
        """Guess from an answer to the same messages, if there is one, from the prompt, because who
        rewrites or sums up a text repeats it, and then ask others."""
        sources: list[Source] = [TextSource("prompt", prompt, min_match=_MIN_MATCH, accepted=0.5)]
        if answer is not None:
            old = TextSource("old answer", answer, min_match=_MIN_MATCH, accepted=0.8, is_answer=True)
            sources.insert(0, old)
        return cls(prompt, [*sources, *others])

    def propose(self, written: Sequence[int], step: Step) -> list[int]:
        """Return tokens that may come next; none where verifying them would not pay."""
        for source in self.sources:
            source.n_silent += 1
            size = best_size(source.accepted, step, source.seconds_each)
            if size == 0 and step.limit and source.n_silent >= source.probe:
                size = 1
            if size and (guesses := source.propose(self._prompt, written, size)):
                source.n_silent = 0
                self._asked, self._n_proposed = source, len(guesses)
                return guesses
        self._asked = None
        return []

    def told(self, accepted: int) -> None:
        """Learn how many of the last guesses were right."""
        if self._asked is not None:
            self._asked.told(self._n_proposed, accepted)
