"""What a terminal is shown: late progress bars, and text without control characters."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 240  # columns
_DELAY = 0.5  # seconds before a bar is worth showing

# A model may write escape sequences; a terminal would obey them.
_CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class LateBar:
    """A progress bar on stderr that appears if the work is not done soon, and only on a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begin = time.monotonic()
        self._progress: Any = None

    def __enter__(self) -> LateBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: float, total: float) -> None:
        if self._progress is None:
            if time.monotonic() - self._begin < _DELAY or done >= total or not sys.stderr.isatty():
                return
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(self._title, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        """Take the bar away, if it was shown."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def table_console() -> Console:
    """Return a console for tables on stdout: as wide as the terminal, or as a line needs in a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


class Output:
    """Writes an answer to stdout as it comes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._line_is_open = False
        if hasattr(self._stream, "reconfigure"):  # a console that cannot show all of Unicode
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> None:
        if text:
            self._line_is_open = not text.endswith("\n")  # first: an interrupt may follow the write
            self._stream.write(printable(text) if self._is_terminal else text)
            self._stream.flush()

    def write_dim(self, text: str) -> None:
        """Write what is beside the answer; dim on a terminal that can."""
        if text and self._is_terminal and "NO_COLOR" not in os.environ:
            self._line_is_open = not text.endswith("\n")
            self._stream.write(f"\x1b[2m{printable(text)}\x1b[22m")
            self._stream.flush()
        else:
            self.write(text)

    def end_line(self) -> None:
        if self._line_is_open:
            self.write("\n")


@contextlib.contextmanager
def key_by_key() -> Iterator[None]:
    """Let the terminal keep each key for who reads next.

    While nobody does, in its mode for whole lines, it takes a Ctrl-D for itself, and it is lost.
    """
    try:
        import termios
    except ImportError:  # Windows: a console has no such mode
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    mode = termios.tcgetattr(sys.stdin)
    mode[3] &= ~termios.ICANON
    termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey."""
    return text.translate(_CONTROLS)
