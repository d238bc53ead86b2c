"""A response that is sent as it is written."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

EVENTS: Final = "text/event-stream"
_SEND_SECONDS: Final = 60.0  # for a client that does not read
_PING_SECONDS: Final = 15.0
_PING: Final = b": ping\n\n"  # a comment
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy must not collect


class Streamed(StreamingResponse):
    """Parts that are sent until the last, or until the client goes away or does not read.

    A stream of events shows signs of life meanwhile. The parts are closed, whatever ends it.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(parts, headers=_HEADERS, media_type=media_type)
        self._parts = parts
        self._since: float | None = None  # when the part being sent was ready,
        self._ping_since: float | None = None  # and the sign of life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ends = [self.stream_response(send), self.listen_for_disconnect(receive), self._watch()]
        if EVENTS in self.headers["content-type"]:
            ends.append(self._show_life(send))
        tasks = [asyncio.ensure_future(end) for end in ends]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def stream_response(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        async with contextlib.aclosing(self._parts) as parts:
            await send(head)
            async for part in parts:
                self._since = time.monotonic()
                await send({"type": "http.response.body", "body": part, "more_body": True})
                self._since = None
        self._since = time.monotonic()
        await send({"type": "http.response.body", "body": b""})

    async def _watch(self) -> None:
        """Fail when the client has not read for too long: a timer for each part would cost more."""
        while True:
            await asyncio.sleep(_PING_SECONDS)
            for since in (self._since, self._ping_since):
                if since is not None and time.monotonic() - since > _SEND_SECONDS:
                    raise TimeoutError

    async def _show_life(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_PING_SECONDS)
            if self._since is None:  # sent here and now: another task would come after the last part
                self._ping_since = time.monotonic()
                await send({"type": "http.response.body", "body": _PING, "more_body": True})
                self._ping_since = None
