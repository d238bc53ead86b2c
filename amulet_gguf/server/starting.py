"""What is answered while the model is being loaded."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from amulet_gguf.server.app import guarded
from amulet_gguf.server.errors import RETRY_AFTER, RequestError, as_json
from amulet_gguf.server.guard import Access

_HEADERS: Final = {"retry-after": str(RETRY_AFTER)}


class Starting:
    """An ASGI app that lets everybody wait, until another one takes its place.

    Attributes:
        app: what answers.
        progress: fraction of the model that is loaded.
    """

    def __init__(self, access: Access) -> None:
        self.progress = 0.0
        self.app: ASGIApp = guarded(self._put_off, access, lambda path, status: None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    async def _put_off(self, scope: Scope, receive: Receive, send: Send) -> None:
        progress = round(self.progress, 2)
        if scope["path"] == "/health":
            response = as_json({"status": "loading", "progress": progress}, 503, _HEADERS)
        else:
            message = f"the model is being loaded: {progress:.0%} is there"
            response = RequestError(503, message, code="loading").response_for(scope["path"])
        await response(scope, receive, send)
