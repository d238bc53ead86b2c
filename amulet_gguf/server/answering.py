"""Requests become answers: whole, or as a stream, in the words of any dialect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from amulet_gguf.engine.answer import Answer, Piece
from amulet_gguf.errors import AmuletError
from amulet_gguf.server.asked import MAX_ANSWERS, Asked
from amulet_gguf.server.errors import RequestError, as_json
from amulet_gguf.server.metrics import Metrics
from amulet_gguf.server.streaming import Streamed
from amulet_gguf.service.service import AmuletService
from amulet_gguf.service.stream import ServiceStream
from amulet_gguf.settings import Settings
from amulet_gguf.stream import AnswerStream, OnPrefill


class Reply(Protocol):
    """The answer to one request, in a dialect's words.

    - id: of the answer.
    - media_type: of its stream: "text/event-stream", or lines of JSON.
    - whole: the object of answers that were not streamed.
    - opening, progress, events, closing: what a stream sends before, as the prompt is read, for each
      piece, and behind.
    - failed: what a stream sends where it breaks off.
    """

    @property
    def id(self) -> str: ...
    @property
    def media_type(self) -> str: ...
    def whole(self, answers: Sequence[Answer]) -> Any: ...
    def opening(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]: ...
    def progress(self, n_read: int, n_prompt: int) -> Iterable[bytes]: ...
    def events(self, index: int, piece: Piece) -> Iterable[bytes]: ...
    def closing(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]: ...
    def failed(self, error: RequestError) -> Iterable[bytes]: ...


class Answering:
    """Asks a service, and hands what it writes to whoever asked.

    Attributes:
        live: streams under way, by the id of their answer.
    """

    def __init__(self, service: AmuletService, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics
        self.live: dict[str, Sequence[ServiceStream]] = {}

    async def answer(
        self, asked: Asked, settings: Settings, reply: Reply, request: Request, *, is_streamed: bool
    ) -> Response:
        """Return the response to a request.

        Raises:
            RequestError, AmuletError: it is not possible, or failed before its first byte.
        """
        n_prompts = 1 if asked.messages is not None else len(asked.texts)
        if not 1 <= n_prompts * asked.n <= MAX_ANSWERS:
            message = f"one request may ask for 1 to {MAX_ANSWERS} answers"
            raise RequestError(400, message, code="invalid_value", param="n")
        streams: list[ServiceStream] = []
        reading = _Reading() if asked.has_progress and is_streamed else None
        try:
            self._ask(asked, settings, streams, None if reading is None else reading.tell)
            for stream in streams:
                await stream.accepted()
            if is_streamed:
                return Streamed(self._events(reply, streams, reading), reply.media_type)
            answers = await self._collect(streams, request)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return as_json(reply.whole(answers))

    def _ask(
        self,
        asked: Asked,
        settings: Settings,
        streams: list[ServiceStream],
        on_prefill: OnPrefill | None,
    ) -> None:
        """Ask for all answers; those that were asked for stand in `streams`, whatever happens."""
        prompts: list[dict[str, Any]] = [{"text": text} for text in asked.texts]
        if asked.messages is not None:
            prompts = [{"messages": asked.messages, "draft": asked.draft}]
        for prompt in prompts:
            for i in range(asked.n):
                seed = None if settings.seed is None else (settings.seed + i) % 2**64
                stream = self._service.stream(
                    settings=settings.replace(seed=seed),
                    is_adjustable=asked.is_adjustable,
                    n_alternatives=asked.n_alternatives,
                    tools=asked.tools,
                    on_prefill=on_prefill,
                    **prompt,
                )
                streams.append(stream)

    async def _collect(self, streams: Sequence[ServiceStream], request: Request) -> list[Answer]:
        """Wait for whole answers, unless the client goes away."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            for stream in streams:
                stream.cancel()

        watching = asyncio.create_task(watch())
        try:
            return list(await asyncio.gather(*(stream.answer_async() for stream in streams)))
        finally:
            watching.cancel()
            self._count(streams)

    async def _events(
        self, reply: Reply, streams: Sequence[ServiceStream], reading: _Reading | None
    ) -> AsyncGenerator[bytes, None]:
        self.live[reply.id] = streams
        try:
            for each in reply.opening(streams):
                yield each
            if reading is not None:
                async for n_read, n_prompt in reading.until_written(streams[0]):
                    for each in reply.progress(n_read, n_prompt):
                        yield each
            async for index, piece in _merged(streams):
                for each in reply.events(index, piece):
                    yield each
            for each in reply.closing(streams):
                yield each
        except AmuletError as error:
            for each in reply.failed(RequestError.of(error)):
                yield each
        finally:
            del self.live[reply.id]
            for stream in streams:
                stream.cancel()
            self._count(streams)

    def _count(self, streams: Sequence[ServiceStream]) -> None:
        for stream in streams:
            self._metrics.count_answer(stream.usage, stream.timings)


class _Reading:
    """Hands on how much of a prompt is read, from the engine's thread to the server's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

    def tell(self, n_read: int, n_prompt: int) -> None:
        """Say it; for any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._told.put_nowait, (n_read, n_prompt))

    async def until_written(self, stream: ServiceStream) -> AsyncIterator[tuple[int, int]]:
        """Yield what is said until a stream has something to take, and then that all is read."""
        n_read = n_prompt = 0
        written = asyncio.ensure_future(stream.ready())
        told = asyncio.ensure_future(self._told.get())
        try:
            while True:
                await asyncio.wait({written, told}, return_when=asyncio.FIRST_COMPLETED)
                if not told.done():
                    break
                n_read, n_prompt = told.result()
                yield n_read, n_prompt
                told = asyncio.ensure_future(self._told.get())
            if n_read < n_prompt:
                yield n_prompt, n_prompt
        finally:
            written.cancel()
            told.cancel()


async def _merged(streams: Sequence[ServiceStream]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of several answers as they come, each with its answer's number."""
    if len(streams) == 1:  # without the cost of a task
        async for piece in streams[0]:
            yield 0, piece
        return
    next_ones = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while next_ones:
            done, _ = await asyncio.wait(next_ones, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = next_ones.pop(task)
                found = task.result()
                if found is not None:
                    next_ones[asyncio.ensure_future(anext(streams[index], None))] = index
                    yield index, found
    finally:
        for task in next_ones:
            task.cancel()
