"""One answer under way: the same for who makes the engine's steps and for who waits for a service's."""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from amulet_gguf.declaration import check_callable
from amulet_gguf.engine.answer import Answer, Piece, Timings, Usage, joined
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.generation import Generation
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import AmuletError, SettingError, shown
from amulet_gguf.preferences import Preference
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Options, Settings

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

logger = logging.getLogger(__name__)

#: What makes the request of an answer.
Plan: TypeAlias = Callable[[Planner, Settings], Request]
#: Something to do on the thread that makes the engine's steps.
Action: TypeAlias = Callable[[Engine, Planner], None]
#: Called with the tokens of a prompt that were read, and all of them.
OnPrefill: TypeAlias = Callable[[int, int], None]


class JobOptions(TypedDict, total=False):
    """What an answer may be asked for with, beside its settings.

    Attributes:
        is_adjustable: it has all branches, and `AnswerStream.adjust` may be used.
        on_prefill: called on the thread that makes the engine's steps; must return soon. If it raises,
            the answer fails with that.
        on_end: called once, by who takes the pieces: when the last was taken, the answer failed, or its
            stream was closed (not where it was merely dropped).
    """

    is_adjustable: bool
    on_prefill: OnPrefill | None
    on_end: Callable[[AnswerStream], None] | None


class Job:
    """An answer as all threads see it, from the call that asks for it on.

    Attributes:
        settings: as they are now.
        adjusted: the fields of them that were changed meanwhile.
        options: see `JobOptions`.
        generation: once it is queued in the engine.
        error: why there is none.
        is_cancelled: it was, perhaps before there was one.
        lock: held while any of these changes.
    """

    def __init__(self, settings: Settings, **options: Unpack[JobOptions]) -> None:
        for name in ("on_prefill", "on_end"):
            check_callable(name, options.get(name))
        self.settings = settings
        self.adjusted: Options = {}
        self.options = options
        self.generation: Generation | None = None
        self.error: BaseException | None = None
        self.is_cancelled = False
        # A stream is cancelled when it is collected, which may be in the middle of anything.
        self.lock = threading.RLock()

    @property
    def is_finished(self) -> bool:
        """Nothing more will be written."""
        if self.generation is not None:
            return self.generation.is_finished
        return self.is_cancelled or self.error is not None

    def tell_prefill(self) -> None:
        """Report what has been read of the prompt."""
        on_prefill, generation = self.options.get("on_prefill"), self.generation
        if on_prefill is not None and generation is not None and generation.n_tokens == 0:
            on_prefill(generation.n_read, generation.n_prefill)

    def cancel(self, engine: Engine, _planner: Planner) -> None:
        """End it; an `Action`."""
        if self.generation is not None:
            engine.cancel(self.generation)

    def remix(self, _engine: Engine, planner: Planner) -> None:
        """Give it the mixture of its settings; an `Action`."""
        with self.lock:  # the mixture of older settings must not come last
            if self.generation is not None:
                self.generation.mixture = planner.mixture(self.settings)


class AnswerStream(Iterator[Piece]):
    """The pieces of an answer as they are written, for one thread.

    Leaving its `with` cancels what is not written yet. `cancel`, `adjust` and the counts may be used
    from any thread.

    Attributes:
        pieces: those taken so far.
    """

    def __init__(self, job: Job, do: Callable[[Action], None]) -> None:
        """Begin to take pieces.

        Args:
            do: does something on the thread that makes the engine's steps.
        """
        self._job = job
        self._do = do
        self.pieces: list[Piece] = []

    @abstractmethod
    def _take(self) -> Piece | None:
        """Return the next piece, or None after the last; errors as `answer`."""

    def __next__(self) -> Piece:
        try:
            piece = self._take()
        except BaseException:
            try:
                self.close()
            except Exception:  # of `on_end`: it must not hide why the answer failed
                logger.exception("what was to be done at the end of an answer failed")
            raise
        if piece is None:
            raise StopIteration
        self._took(piece)
        return piece

    def _took(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish_reason is not None:
            self._end()

    def _end(self) -> None:
        on_end = self._job.options.pop("on_end", None)
        if on_end is not None:
            on_end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is not written yet; what was taken stays."""
        self.cancel()
        self._end()

    def cancel(self) -> None:
        """End the answer within a step; the pieces that are left can still be taken."""
        self._do(self._job.cancel)

    def adjust(self, strength: float | None = None, weights: Sequence[float] | None = None) -> None:
        """Change the strength, or the weights of the preferences, from the next token on.

        That is the next one which no step has begun: with a draft, a step chooses up to eight.

        Args:
            weights: one for each preference, in their order.

        Raises:
            SettingError: out of range, another number of weights, or the answer is not adjustable.
        """
        job = self._job
        if not job.options.get("is_adjustable"):
            raise SettingError("this answer is not adjustable: ask for it with is_adjustable=True")
        with job.lock:
            prefer, changes = job.settings.prefer, Options()
            if weights is not None:
                try:
                    weights = tuple(weights)
                except TypeError:
                    message = f"weights must be numbers, got {shown(weights)}"
                    raise SettingError(message, "weights") from None
                if len(weights) != len(prefer):
                    message = f"expected {len(prefer)} weights, got {len(weights)}"
                    raise SettingError(message, "weights")
                changes["prefer"] = tuple(map(Preference, [each.text for each in prefer], weights))
            if strength is not None:
                changes["strength"] = strength
            job.settings = job.settings.replace(**changes)
            job.adjusted.update(changes)
        self._do(job.remix)

    @property
    def settings(self) -> Settings:
        """As they are now, with numbers for what was left to the model."""
        return self._job.settings

    @property
    def adjusted(self) -> Options:
        """The fields of the settings that `adjust` changed."""
        return self._job.adjusted

    @property
    def is_finished(self) -> bool:
        """Nothing more will be written; the last pieces may not have been taken yet."""
        return self._job.is_finished

    @property
    def text(self) -> str:
        """What was taken of the answer so far, without thoughts."""
        return joined(self.pieces)

    @property
    def thought(self) -> str:
        """What was taken of the thought before it so far."""
        return joined(self.pieces, "thought").strip()

    @property
    def usage(self) -> Usage:
        """So far."""
        generation = self._job.generation
        return Usage(0, 0, 0, 0) if generation is None else generation.usage

    @property
    def timings(self) -> Timings:
        """So far."""
        generation = self._job.generation
        return Timings(0.0, 0.0, 0.0, 0.0) if generation is None else generation.timings

    def answer(self) -> Answer:
        """Take the pieces that are left, and return the whole answer, what was taken before included.

        Raises:
            AmuletError: the generation failed.
        """
        for _ in self:
            pass
        return self._whole()

    def _whole(self) -> Answer:
        generation = self._job.generation
        if generation is not None and generation.error is not None:
            raise generation.error
        reason = self.pieces[-1].finish_reason if self.pieces else None
        return Answer(self.text, reason or "cancelled", self.usage, self.timings, self.pieces)


class Stream(AnswerStream):
    """An answer whose pieces are written as they are taken: by the thread that takes them."""

    def __init__(self, job: Job, engine: Engine, planner: Planner) -> None:
        super().__init__(job, lambda action: action(engine, planner))
        assert job.generation is not None
        self._written = engine.stream(job.generation, lambda _: job.tell_prefill())

    def _take(self) -> Piece | None:
        return next(self._written, None)

    def close(self) -> None:
        """Cancel what is not written yet; nothing more can be taken."""
        super().close()
        with contextlib.suppress(ValueError):  # it is at work, further down this stack or elsewhere
            self._written.close()

    def __del__(self) -> None:
        with contextlib.suppress(AmuletError):
            self.cancel()
