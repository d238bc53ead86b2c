"""A server in a thread, with its service at hand."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amulet_gguf.home.config import Config
from amulet_gguf.server.app import create_app
from amulet_gguf.server.guard import Access
from amulet_gguf.server.run import listening, make_server
from amulet_gguf.server.served import Served
from amulet_gguf.service.service import AmuletService
from amulet_gguf.settings import Settings


@dataclass
class Running:
    url: str
    port: int
    service: AmuletService


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_free(service: AmuletService) -> bool:
    """Nothing runs or waits, and no sequence is taken."""
    return service.n_live == 0 and service.n_waiting == 0


@contextlib.contextmanager
def serving(
    path: Path,
    access: Access | None = None,
    *,
    settings: Settings | None = None,
    config: Config | None = None,
    max_tokens: int = 450,
    without: tuple[str, ...] = (),
    **options: Any,
) -> Iterator[Running]:
    access = access or Access()
    options = {"n_ctx": 512, "n_threads": 1, "n_sequences": 8, **options}
    with AmuletService(path, **options) as service, listening(access, 0) as listeners:
        service.wait_ready()
        n_sequences = options["n_sequences"]
        served = Served(
            service, path.stem, settings or Settings(), config, max_tokens, n_sequences=n_sequences
        )
        is_ready = threading.Event()
        server = make_server(create_app(served, access, without), is_ready.set, lambda: None)
        thread = threading.Thread(target=server.run, args=(listeners,))
        thread.start()
        assert is_ready.wait(20)
        port = listeners[0].getsockname()[1]
        try:
            yield Running(f"http://127.0.0.1:{port}", port, service)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
