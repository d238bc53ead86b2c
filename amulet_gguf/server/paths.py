"""Paths as clients spell them: without /v1, with a slash at the end; HEAD and OPTIONS."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: What stands under /v1, and is asked for without it by clients with another idea of a base URL.
_UNVERSIONED: Final = ("/chat/", "/completions", "/models", "/responses", "/messages", "/tastes/")


class Paths:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        if any(
            path == each.rstrip("/") or path.startswith(each.rstrip("/") + "/") for each in _UNVERSIONED
        ):
            path = f"/v1{path}"
        scope = {**scope, "path": path, "raw_path": path.encode("utf-8", "surrogatepass")}
        if scope["method"] == "OPTIONS":
            await send({"type": "http.response.start", "status": 204, "headers": _ALLOW})
            await send({"type": "http.response.body", "body": b""})
        elif scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _headless(send))
        else:
            await self._app(scope, receive, send)


_ALLOW: Final = [(b"allow", b"GET, HEAD, POST, PATCH, DELETE, OPTIONS")]


def _headless(send: Send) -> Send:
    """Return what sends the head of a response without its body."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return sent
