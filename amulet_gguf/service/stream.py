"""One answer of a service, as the threads see it that ask for it, plan it and write it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from amulet_gguf.engine.answer import Answer, Piece
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.generation import Generation
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings
from amulet_gguf.stream import AnswerStream, Job, JobOptions, Plan

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class ServiceJob(Job):
    """An answer that some threads wait for while others plan and write it.

    Attributes:
        plan: makes the request.
        pieces: not yet taken.
    """

    def __init__(self, plan: Plan, settings: Settings, **options: Unpack[JobOptions]) -> None:
        super().__init__(settings, **options)
        self.plan = plan
        self.pieces: deque[Piece] = deque()
        self._has_news = threading.Condition(self.lock)
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def is_accepted(self) -> bool:
        """The engine has it, or never will."""
        return self.generation is not None or self.is_finished

    @property
    def has_more(self) -> bool:
        return self.is_finished or bool(self.pieces)

    def begin(self, generation: Generation) -> None:
        with self.lock:
            self.generation = generation
            if not self.is_cancelled:  # else its last piece is there
                self.pieces = generation.pieces
        self.notify()

    def give_up(self) -> None:
        """Cancel it, whether or not it has a generation yet; from any thread."""
        with self.lock:
            if not self.is_accepted:
                self.pieces.append(Piece("", finish_reason="cancelled"))
            self.is_cancelled = True
        self.notify()

    def cancel(self, engine: Engine, planner: Planner) -> None:
        super().cancel(engine, planner)
        self.notify()

    def fail(self, error: BaseException) -> None:
        if self.generation is not None:
            self.generation.fail(error)
        elif not self.is_cancelled:
            self.error = error
        self.notify()

    def forget(self, error: BaseException) -> None:
        """Fail in a forked process, in which nobody gives back a lock that was taken before."""
        self.lock = threading.RLock()
        self._has_news = threading.Condition(self.lock)
        self._waiters.clear()  # of an event loop that runs elsewhere
        self.fail(error)

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
            try:
                await future
            finally:  # a task that is cancelled waits no more
                with self.lock, contextlib.suppress(ValueError):
                    self._waiters.remove((loop, future))

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


class ServiceStream(AnswerStream, AsyncIterator[Piece]):
    """An answer that a service writes, for one thread (`for`) or task (`async for`).

    Leaving its `with` or `async with`, or dropping it, cancels what is not written yet. `cancel`,
    `adjust` and the counts may be used from any thread and wait for nothing.
    """

    _job: ServiceJob

    def _take(self) -> Piece | None:
        self._job.wait()
        return self._job.take()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        await self._job.wait_async(lambda: self._job.has_more)
        try:
            return next(self)  # there is something to take
        except StopIteration:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._job.is_finished:
            self.cancel()

    def cancel(self) -> None:
        self._job.give_up()
        super().cancel()

    async def accepted(self) -> None:
        """Wait until the prompt is queued in the engine.

        Raises:
            AmuletError: it cannot be answered.
        """
        await self._job.wait_async(lambda: self._job.is_accepted)
        if self._job.error is not None:
            raise self._job.error

    async def ready(self) -> None:
        """Wait until there is a piece to take, or there will be none."""
        await self._job.wait_async(lambda: self._job.has_more)

    async def answer_async(self) -> Answer:
        """Do as `answer`, for a task."""
        async for _ in self:
            pass
        return self._whole()
