"""A progress bar that most work is too short for."""

from __future__ import annotations

import sys
import time
from typing import Any

_DELAY = 0.5  # seconds before a bar is worth showing


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
            from rich.progress import Progress

            from amulet_gguf.cli.screen import Screen

            self._progress = Progress(console=Screen(stderr=True), transient=True)
            self._task = self._progress.add_task(self._title, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        """Take the bar away, if it was shown."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
