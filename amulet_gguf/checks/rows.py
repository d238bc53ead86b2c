"""What more rows in a step cost, and what drafts make of it: `amulet bench --rows --drafts`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.drafts import Source
from amulet_gguf.engine.request import Request
from amulet_gguf.llama.context import Context, max_sequences
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

Progress = Callable[[float, float], None]

_ROWS: Final = (1, 2, 4, 8, 16, 32)
_SETTLING: Final = 3  # steps of other rows after which a GPU has its graph ready
_DEPTH: Final = 64  # tokens in each sequence when a measured step begins
_N_CTX: Final = 256
_TOKENS: Final = 150
_STORY: Final = "Write a long story about a lighthouse keeper and the sea, with many details."
_TEXT: Final = (
    "The report is late because two of the people who were to write it have been ill since the start of "
    "the month. We will send it on Friday. Do not call the office before then, as nobody can tell you "
    "more. The numbers that you asked for in your letter of the third are attached; check them, and "
    "tell us by Monday whether they are what you need. If they are not, we cannot help you before the "
    "end of the year, when everybody is back and the books are closed."
)


@dataclass(frozen=True)
class RowCost:
    """Medians in milliseconds of a step of so many rows.

    Attributes:
        abreast_ms: one in each of as many sequences, as answers written at once have them.
        drafts_ms: in two sequences, as the drafts of an answer with one preference have them.
    """

    rows: int
    abreast_ms: float
    drafts_ms: float


@dataclass(frozen=True)
class DraftGain:
    """What drafts made of a task.

    Attributes:
        speed: times as fast per token as without, the median of the rounds.
        tokens_per_step: that the answer was written in, at the last round.
        guesses: tokens that were right and all that were guessed, by who guessed them.
    """

    task: str
    speed: float
    tokens_per_step: float
    guesses: dict[str, tuple[int, int]]


def measure_rows(amulet: Amulet, rounds: int, progress: Progress) -> list[RowCost]:
    """Measure steps of 1 to 32 rows in turns, at the same depth of context."""
    rows = [n for n in _ROWS if n <= max_sequences()]
    threads = amulet.engine.chosen_threads
    times: dict[tuple[int, bool], list[float]] = {}
    with Context(amulet.model, n_ctx=_N_CTX, n_sequences=max(rows), n_threads=threads) as context:
        steps = _Rows(context)
        for done in range(-1, rounds):  # the first warms up
            for n in rows:
                for is_draft in (False, True)[:n]:
                    seconds = steps.time(n, 2 if is_draft else n)
                    if done >= 0:
                        times.setdefault((n, is_draft), []).append(1000 * seconds)
            if done >= 0:
                progress(done + 1, rounds)
    found = {kind: statistics.median(each) for kind, each in times.items()}
    return [RowCost(n, found[n, False], found[n, n > 1]) for n in rows]


class _Rows:
    """Steps of rows behind the same tokens in all sequences."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._is_offloaded = context.model.share_on_gpu > 0
        random = np.random.default_rng(0)
        self._tokens = random.integers(0, context.model.n_vocab, _DEPTH).astype(np.int32)
        self._begin()

    def _begin(self) -> None:
        self._context.clear()
        self._context.add(0, self._tokens, output=False)
        self._context.decode()
        for sequence in range(1, self._context.n_sequences):
            self._context.copy(0, sequence)
        self.time(1, 1)  # the data move with it

    def time(self, n_rows: int, n_sequences: int) -> float:
        """Return the seconds of a step of so many rows in so many sequences, as many in each."""
        each, n_steps = n_rows // n_sequences, 1 + _SETTLING * self._is_offloaded
        if self._context.length(0) + n_steps * each > self._context.n_ctx:
            self._begin()
        seconds = 0.0
        for _ in range(n_steps):
            for sequence in range(n_sequences):
                self._context.add(sequence, self._tokens[:each], output=True, n_outputs=each)
            begin = time.perf_counter()
            self._context.decode()
            seconds = time.perf_counter() - begin
        return seconds


def measure_drafts(amulet: Amulet, rounds: int, progress: Progress) -> list[DraftGain]:
    """Measure whole answers with and without drafts, greedy, in turns."""
    settings = Settings(prefer="uplifting", strength=4, fade=0, max_tokens=_TOKENS)
    old = amulet.generate(_STORY, settings=settings.replace(strength=3)).text
    tasks: list[tuple[str, str, str | None]] = [
        ("restyle: strength 3 to 4", _STORY, old),
        (
            "rewrite: make this friendlier",
            f"Make this friendlier:\n\n{_TEXT}",
            None,
        ),
        ("sum up", f"Sum up this letter in three sentences:\n\n{_TEXT}", None),
        ("chat", _STORY, None),
    ]
    found = []
    for number, (task, prompt, draft) in enumerate(tasks):
        ratios = []
        for done in range(rounds):
            plain, _, _ = _write(amulet, prompt, settings, None, with_drafts=False)
            drafted, n_tokens, sources = _write(amulet, prompt, settings, draft, with_drafts=True)
            ratios.append(plain / max(drafted, 1e-9))
            progress(number * rounds + done + 1, len(tasks) * rounds)
        n_right = sum(source.n_right for source in sources)
        guesses = {source.name: (source.n_right, source.n_guessed) for source in sources}
        speed = statistics.median(ratios)
        found.append(DraftGain(task, speed, n_tokens / (n_tokens - n_right), guesses))
    return found


def _write(
    amulet: Amulet, prompt: str, settings: Settings, draft: str | None, *, with_drafts: bool
) -> tuple[float, int, list[Source]]:
    """Write an answer; return its seconds per token after the first, its tokens, and who guessed."""
    sources: list[Source] = []

    def plan(planner: Planner, resolved: Settings) -> Request:
        request = planner.request(prompt, None, resolved, draft=draft)
        if not with_drafts or request.drafts is None:
            return replace(request, drafts=None)
        sources.extend(request.drafts.sources)
        for source in sources:  # a draft model's are of all answers
            source.n_guessed = source.n_right = 0
        return request

    answer = amulet.start(plan, settings).answer()
    n_tokens = answer.usage.completion_tokens
    return answer.timings.decode / max(1, n_tokens - 1), n_tokens, sources
