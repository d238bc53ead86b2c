"""How the process ends: by a signal or with its parent, within a second, whatever runs.

On Windows, a console that closes ends the process by itself.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from amulet_gguf.system.platforms import heeded, wait_for_end, wait_for_parent

if TYPE_CHECKING:
    import uvicorn

#: From the beginning of the end until the process is ended, wherever it is: a step of llama.cpp may take
#: longer, and cannot be broken off on every device. Files are replaced whole: none is left in half.
END_SECONDS: Final = 0.7

logger = logging.getLogger(__name__)


class Ending:
    """The end of the process, which comes once."""

    def __init__(self) -> None:
        self._server: uvicorn.Server | None = None
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        # The only queue whose `put` is safe in a handler of signals, which interrupts anything.
        self._codes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._is_begun = False
        threading.Thread(target=self._end_in_time, name="amulet-ending", daemon=True).start()

    @property
    def is_begun(self) -> bool:
        return self._is_begun

    def begin(self, code: int = 0) -> None:
        """Tell the server to end, and see to it that the process does.

        Args:
            code: of the exit, if it takes too long.
        """
        self._is_begun = True
        if self._server is not None:
            self._server.should_exit = True
        self._codes.put(code)

    def _end_in_time(self) -> None:
        code = self._codes.get()
        time.sleep(END_SECONDS)
        os._exit(code)

    def catch_signals(self, server: uvicorn.Server) -> None:
        """End the server when a signal asks for it; a second one ends the process at once."""
        self._server = server
        server.should_exit = self._is_begun
        for number in (signal.SIGINT, signal.SIGTERM, *heeded("SIGHUP", "SIGBREAK")):
            self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        self.begin(128 + number)

    def finish(self) -> None:
        """If a signal began the end, do what it would have done alone: a parent sees which it was."""
        if self._signal is not None:
            signal.signal(self._signal, self._before[self._signal])
            signal.raise_signal(self._signal)


def watch_parent(on_gone: Callable[[], None]) -> None:
    """Call back when the parent has ended, or closed the pipe that is stdin."""
    watches = [wait_for_parent(), *([partial(wait_for_end, 0)] if _has_pipe() else [])]

    def run(wait: Callable[[], None]) -> None:
        wait()
        logger.info("the parent is gone: the server ends")
        on_gone()

    for wait in watches:
        threading.Thread(target=run, args=(wait,), name="amulet-parent", daemon=True).start()


def _has_pipe() -> bool:
    """Tell whether stdin is a pipe: nothing else comes to an end when its owner does."""
    if sys.stdin is None:  # its number may be another file's by now
        return False
    mode = os.fstat(0).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
