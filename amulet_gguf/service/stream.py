"""One answer of a service, as the threads see it that ask for it, plan it and write it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.answer import Answer, Piece, Timings, Usage
from amulet_gguf.engine.generation import Generation, Request
from amulet_gguf.errors import SettingError
from amulet_gguf.preferences import Preference
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self


class Job:
    """A generation as all threads see it, from the call that asks for it on.

    Attributes:
        plan: makes the request.
        settings: as they are now.
        is_adjustable: they may change.
        generation: once it is queued in the engine.
        pieces: not yet taken.
        error: why there is no generation.
    """

    def __init__(
        self,
        plan: Callable[[Planner, Settings], Request],
        settings: Settings,
        is_adjustable: bool,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.is_adjustable = is_adjustable
        self.on_prefill = on_prefill
        self.generation: Generation | None = None
        self.pieces: deque[Piece] = deque()
        self.error: BaseException | None = None
        self.is_cancelled = False
        # A stream is cancelled when it is collected, which may be in the middle of `notify`.
        self.lock = threading.RLock()
        self._has_news = threading.Condition(self.lock)
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def is_accepted(self) -> bool:
        """The engine has it, or never will."""
        return self.generation is not None or self.is_finished

    @property
    def is_finished(self) -> bool:
        if self.generation is not None:
            return self.generation.is_finished
        return self.is_cancelled or self.error is not None

    @property
    def has_more(self) -> bool:
        return self.is_finished or bool(self.pieces)

    def begin(self, generation: Generation) -> None:
        with self.lock:
            self.generation = generation
            self.pieces = generation.pieces
        self.notify()

    def cancel(self) -> None:
        with self.lock:
            if not self.is_accepted:
                self.pieces.append(Piece("", finish_reason="cancelled"))
            self.is_cancelled = True
        self.notify()

    def fail(self, error: BaseException) -> None:
        if self.generation is not None:
            self.generation.fail(error)
        else:
            self.error = error
        self.notify()

    def notify(self) -> None:
        """Wake those who wait; what is new must be in place before."""
        with self.lock:
            self._has_news.notify_all()
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_wake, future)

    def wait(self) -> None:
        """Wait until `take` has an answer."""
        with self.lock:
            while not self.has_more:
                self._has_news.wait()

    async def wait_async(self, is_enough: Callable[[], bool]) -> None:
        """Wait for news until they are enough."""
        loop = asyncio.get_running_loop()
        while True:
            with self.lock:
                if is_enough():
                    return
                future = loop.create_future()
                self._waiters.append((loop, future))
            await future

    def take(self) -> Piece | None:
        """Return the next piece, or None after the last; only one caller, after waiting.

        Raises:
            BaseException: the generation failed.
        """
        if self.pieces:
            return self.pieces.popleft()
        error = self.error if self.generation is None else self.generation.error
        if error is not None:
            raise error
        return None


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class ServiceStream(Iterator[Piece], AsyncIterator[Piece]):
    """The pieces of an answer as they are written, for one thread (`for`) or task (`async for`).

    Leaving its `with` or `async with`, or dropping it, cancels what is not written yet. `cancel`,
    `adjust` and the counts may be used from any thread and wait for nothing.
    """

    def __init__(self, job: Job, post: Callable[[Callable[[Amulet], None]], None]) -> None:
        self._job = job
        self._post = post

    def __next__(self) -> Piece:
        self._job.wait()
        piece = self._job.take()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        await self._job.wait_async(lambda: self._job.has_more)
        piece = self._job.take()
        if piece is None:
            raise StopAsyncIteration
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not self._job.is_finished:
            self.cancel()

    async def accepted(self) -> None:
        """Wait until the prompt is queued in the engine.

        Raises:
            AmuletError: it cannot be answered.
        """
        await self._job.wait_async(lambda: self._job.is_accepted)
        if self._job.error is not None:
            raise self._job.error

    def answer(self, taken: Sequence[Piece] = ()) -> Answer:
        """Take the pieces that are left, and return the whole answer.

        Args:
            taken: those taken before.

        Raises:
            AmuletError: the generation failed.
        """
        return self._whole([*taken, *self])

    async def answer_async(self, taken: Sequence[Piece] = ()) -> Answer:
        """Do as `answer`, for a task."""
        return self._whole([*taken, *[piece async for piece in self]])

    def _whole(self, pieces: list[Piece]) -> Answer:
        if self._job.generation is None:  # cancelled before it was one
            return Answer("", "cancelled", self.usage, self.timings, pieces)
        return self._job.generation.answer(pieces)

    def cancel(self) -> None:
        """End the answer within a step; the pieces that are left can still be taken."""
        self._job.cancel()
        self._post(partial(cancel, self._job))

    def adjust(self, strength: float | None = None, weights: Sequence[float] | None = None) -> None:
        """Change the strength, or the weights of the preferences, from the next token on.

        Args:
            weights: one for each preference, in their order.

        Raises:
            SettingError: out of range, another number of weights, or the stream is not adjustable.
        """
        job = self._job
        if not job.is_adjustable:
            raise SettingError("this answer is not adjustable: ask for it with is_adjustable=True")
        with job.lock:
            prefer = job.settings.prefer
            if weights is not None:
                if len(weights) != len(prefer):
                    raise SettingError(f"expected {len(prefer)} weights, got {len(weights)}")
                prefer = tuple(map(Preference, [each.text for each in prefer], weights))
            new = job.settings.strength if strength is None else strength
            job.settings = job.settings.replace(prefer=prefer, strength=new)
        self._post(partial(remix, job))

    @property
    def settings(self) -> Settings:
        """As they are now."""
        return self._job.settings

    @property
    def is_finished(self) -> bool:
        """Nothing more will be written; the last pieces may not have been taken yet."""
        return self._job.is_finished

    @property
    def usage(self) -> Usage:
        """So far."""
        generation = self._job.generation
        return Usage(0, 0, 0) if generation is None else generation.usage

    @property
    def timings(self) -> Timings:
        """So far."""
        generation = self._job.generation
        return Timings(0.0, 0.0, 0.0, 0.0) if generation is None else generation.timings


def cancel(job: Job, amulet: Amulet) -> None:
    """End a job; on the engine's thread."""
    if job.generation is not None:
        amulet.engine.cancel(job.generation)
        job.notify()


def remix(job: Job, amulet: Amulet) -> None:
    """Give a job the mixture of its settings; on the engine's thread."""
    if job.generation is not None:
        job.generation.mixture = amulet.planner.mixture(job.settings)
