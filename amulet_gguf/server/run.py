"""The socket, how long connections may idle, and how the last ones are let go."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator
from typing import Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from amulet_gguf.errors import SettingError
from amulet_gguf.server.guard import Access, is_loopback

#: For the head of a request, from the connection or from its own first byte.
HEAD_SECONDS: Final = 15.0
_CLOSING_SECONDS: Final = 0.3  # for clients to read the end of their answers


class _Protocol(H11Protocol):
    """Closes connections that do not get to the end of a request's head in time.

    uvicorn itself waits forever for a first request, and for the rest of a head.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._expire)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_asking = self.cycle is None or self.cycle.response_complete
        if not is_asking and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif is_asking and self._deadline is None:  # the beginning of another request
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._expire)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _expire(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


@contextlib.contextmanager
def listening(access: Access, port: int) -> Generator[list[socket.socket], None, None]:
    """Listen, with a socket for each address; all have the same port, any free one for 0.

    Raises:
        SettingError: an address is not this machine's, is in use, or is open to others without a key.
    """
    if not access.is_private and not access.api_key:
        others = ", ".join(host or "''" for host in access.hosts if not is_loopback(host))
        raise SettingError(
            f"{others} can be reached by others: set --api-key or AMULET_API_KEY, or listen on 127.0.0.1"
        )
    if "*" in access.allow_origins:
        raise SettingError("--allow-origin takes origins, not *: every page could ask")
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for host in access.hosts:
            sockets.append(stack.enter_context(_listen(host, port)))
            port = sockets[0].getsockname()[1]
        yield sockets


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "no such port"
        raise SettingError(f"cannot listen on {host}, port {port}: {why or error}") from None
    # Where a socket does not say that it is TCP's, asyncio leaves Nagle's delay on: 40 ms an answer.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=listener.detach())


def make_server(
    app: ASGIApp, on_ready: Callable[[], None], on_exit: Callable[[], None]
) -> uvicorn.Server:
    """Return a server whose `run(sockets=[…])` ends soon after `should_exit` is set.

    Args:
        on_ready: called when connections are answered.
        on_exit: called when the end begins; must return at once.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSING_SECONDS,  # type: ignore[arg-type]  # asyncio takes fractions
    )
    return _Server(config, on_ready, on_exit)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], on_exit: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_exit = on_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # they are the process's own: see `ending`

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_exit()
        await super().shutdown(sockets)
