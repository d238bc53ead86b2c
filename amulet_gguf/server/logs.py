"""Logs that cannot stop the server, as pipes that nobody reads and terminals on hold stop who writes."""

from __future__ import annotations

import atexit
import io
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Final, Literal

from amulet_gguf.errors import SettingError
from amulet_gguf.home.text import printable
from amulet_gguf.system.platforms import open_without_waiting

MAX_WAITING: Final = 1000  # texts
_DRAIN_SECONDS: Final = 0.2


class LossyWriter(io.TextIOBase):
    """Text for a file that may not take it: nobody waits, and what is too much is lost, and counted."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._is_terminal = raw.isatty()
        self._n_lost = 0
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="amulet-log", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str, /) -> int:
        data = text.encode("utf-8", "backslashreplace")
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put(data)
        else:
            self._n_lost += 1
        return len(text)

    def drain(self, seconds: float) -> None:
        """Wait until all is written, but not longer than so many seconds."""
        is_written = threading.Event()
        self._waiting.put(is_written)
        is_written.wait(seconds)

    def _run(self) -> None:
        while True:
            item = self._waiting.get()
            if isinstance(item, bytes):
                self._write(item)
            if self._n_lost and self._waiting.empty():
                n_lost, self._n_lost = self._n_lost, 0
                self._write(f"({n_lost} lines of the log were lost: nobody read it)\n".encode())
            if isinstance(item, threading.Event):
                item.set()

    def _write(self, data: bytes) -> None:
        try:
            while data:
                n_written = self._raw.write(data)
                if not n_written:  # it does not wait, either
                    raise BlockingIOError
                data = data[n_written:]
        except OSError:  # the reader is gone, or the disk is full
            self._n_lost += 1


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def begin_logging(level: str, path: str | None) -> Callable[[], None]:
    """Send logs to a file, or else to stderr; nothing that Python writes to stderr waits from now on.

    Returns:
        a function that waits a moment for what is not written yet.

    Raises:
        SettingError: the file cannot be written.
    """
    try:
        raw = None if path is None else _unbuffered(path, "ab")
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error.strerror}") from None
    # Without a stderr, its number may be another file's by now.
    errors = LossyWriter(_unbuffered(os.devnull if sys.stderr is None else os.dup(2), "wb"))
    file = errors if raw is None else LossyWriter(raw)
    sys.stderr = errors
    handler = logging.StreamHandler(file)
    handler.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
    # Others' details may quote what was asked.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("amulet_gguf").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # the guard tells of failures

    def drain() -> None:
        for writer in {errors, file}:
            writer.drain(_DRAIN_SECONDS)

    atexit.register(drain)
    return drain


def _unbuffered(file: str | int, mode: Literal["ab", "wb"]) -> io.FileIO:
    """Open without a buffer of Python's: a thread that waits would hold its lock when all ends."""
    return open(file, mode, buffering=0, opener=open_without_waiting if isinstance(file, str) else None)
