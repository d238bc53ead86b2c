"""Who may ask, and how much: decided from the head of a request, before anything of it is parsed.

A server on loopback is not out of reach: any page in the user's browser can send requests to it. Foreign
pages are told by their Origin, and those that rebind their own name to this machine by the Host.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amulet_gguf.server.errors import RequestError

MAX_BODY: Final = 2 * 2**20
MAX_HEADERS: Final = 32 * 2**10
BODY_SECONDS: Final = 30.0
_MAX_DRAINED: Final = 64 * 2**20
#: These say nothing that is secret, and a browser cannot send a key when it opens a page.
_OPEN_PATHS: Final = ("/", "/health")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: the addresses or names the server listens on.
        api_key: that requests must carry; None: none.
        allow_hosts: names by which the server may be called, beside its own.
        allow_origins: of pages that may ask, such as "http://localhost:5173".
    """

    hosts: tuple[str, ...] = ("127.0.0.1",)
    api_key: str | None = None
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()

    @property
    def is_private(self) -> bool:
        """Nobody reaches it from other machines."""
        return all(map(is_loopback, self.hosts))


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[str, int], None]) -> None:
        """Guard an app.

        Args:
            count: called with the path and status of every response.
        """
        self._app = app
        self._access = access
        self._names = {name.lower() for name in ("localhost", *access.hosts, *access.allow_hosts)}
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        try:
            try:
                self._check(scope)
                body = await _read(Headers(scope=scope), receive)
            except RequestError as error:
                if error.status == 403:
                    logger.warning("refused: %s", error.message)
                response = error.response_for(scope["path"])
                origin = Headers(scope=scope).get("origin")
                is_asked = error.status == 403 and scope["method"] != "OPTIONS"
                if is_asked and origin is not None:  # its page may read why, and no more
                    response.headers["access-control-allow-origin"] = origin
                await response(scope, receive, watched)
            else:
                # Bodies are JSON, whatever a client forgets to say, and were unpacked.
                heads = [
                    head
                    for head in scope["headers"]
                    if head[0] not in (b"content-type", b"content-encoding", b"content-length")
                ]
                inner = {**scope, "headers": [*heads, (b"content-type", b"application/json")]}
                await self._app(inner, _replay(body, receive), watched)
        except asyncio.CancelledError:
            if not status:
                closing = RequestError(503, "the server is closing", code="closed")
                await closing.response_for(scope["path"])(scope, receive, watched)
            raise
        except Exception as error:
            # Its message may quote what the user wrote: only its kind and place are logged.
            place = traceback.extract_tb(error.__traceback__)[-1]
            logger.error("%s in %s, line %s", type(error).__name__, place.filename, place.lineno)
            if not status:
                failure = RequestError(500, "the server failed at this request")
                await failure.response_for(scope["path"])(scope, receive, watched)
        finally:
            self._count(scope["path"], status)
            took = time.perf_counter() - begin
            path = scope["path"].encode("unicode_escape").decode()[:200]
            logger.info("%s %s %s %.3f s", scope["method"], path, status or "-", took)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            raise RequestError(431, f"the headers are longer than {MAX_HEADERS} bytes")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            name = hosts[0][:100] if hosts else ""
            message = f"this server is not called {name!r}: start it with --allow-host NAME to allow it"
            raise RequestError(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        is_allowed = origin in self._access.allow_origins
        if origin is not None and not is_allowed and _host_of(origin) != hosts[0].lower():
            raise _foreign(origin)
        is_link = scope["path"] == "/" and scope["method"] == "GET"
        is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if origin is None and is_foreign and not is_link:
            raise _foreign("another origin")
        is_preflight = is_allowed and scope["method"] == "OPTIONS"
        if scope["path"] not in _OPEN_PATHS and not is_preflight:
            self._check_key(headers)

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names or is_loopback(name):
            return True
        if any(name.endswith(each[1:]) for each in self._names if each.startswith("*.")):
            return True
        if self._access.is_private:
            return False
        try:  # rebinding takes a name
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_key(self, headers: Headers) -> None:
        if self._access.api_key is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        given = key.strip().encode("latin-1", "replace")
        if not hmac.compare_digest(given, self._access.api_key.encode()):
            message = "a key is needed: send it as Authorization: Bearer KEY"
            raise RequestError(401, message, code="invalid_api_key")


def _foreign(origin: str) -> RequestError:
    message = (
        f"pages of {origin[:100]!r} may not ask: start the server with --allow-origin URL to let them"
    )
    return RequestError(403, message, code="origin_not_allowed")


def _host_of(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


async def _read(headers: Headers, receive: Receive) -> bytes:
    """Return the body.

    Raises:
        RequestError: too large, or too slow.
    """
    length = headers.get("content-length", "0")
    is_too_large = not length.isdigit() or len(length) > 18 or int(length) > MAX_BODY
    if is_too_large and "expect" in headers:  # it has not been sent yet
        raise RequestError(413, f"the body is larger than {MAX_BODY} bytes")
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise RequestError(415, f"the body is encoded as {encoding[:20]!r}: send it plain, or as gzip")
    try:
        body = await asyncio.wait_for(_read_all(receive), BODY_SECONDS)
        return body if encoding == "identity" else _unpacked(body)
    except (TimeoutError, asyncio.TimeoutError):
        raise RequestError(408, f"the body did not come in {BODY_SECONDS:g} seconds") from None


async def _read_all(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "the connection ended before the body")
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY:
            parts.append(part)
        # The rest is read and forgotten: who is still sending cannot read an answer.
        if not message.get("more_body", False) or size > _MAX_DRAINED:
            break
    if size > MAX_BODY:
        raise RequestError(413, f"the body is larger than {MAX_BODY} bytes")
    return b"".join(parts)


def _unpacked(body: bytes) -> bytes:
    unpacking = zlib.decompressobj(wbits=31)
    try:
        data = unpacking.decompress(body, MAX_BODY + 1)
    except zlib.error:
        raise RequestError(400, "the body is not gzip, though its head says so") from None
    if len(data) > MAX_BODY:
        raise RequestError(413, f"the body is larger than {MAX_BODY} bytes when unpacked")
    if not unpacking.eof:
        raise RequestError(400, "the body ends in the middle of its gzip")
    return data


def _replay(body: bytes, receive: Receive) -> Receive:
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
