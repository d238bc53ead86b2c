"""How many CPU threads a context has, beside programs that are busy too.

Threads of one computation wait for each other many times in each step. One that has lost its core to
another program holds up all of them, so that fewer threads on free cores are faster than all of them.
"""

from __future__ import annotations

import os
import time
from typing import Final

import psutil

from amulet_gguf.llama import AFFINITY

_WINDOW: Final = 0.25  # seconds of computing that are judged together
#: Cores that threads may be without, on average, before one of them is too many: some, and a share.
_MISSING: Final = (0.2, 0.05)
_PAUSE: Final = 1.0  # seconds before another thread is tried
_MAX_PAUSE: Final = 4.0  # after it has failed again and again


def default_threads() -> int:
    """Return the number of physical cores this process may use."""
    physical: int = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if AFFINITY is not None:
        physical = min(physical, len(AFFINITY))
    return max(1, physical)


class Threads:
    """Watches steps, and says how many threads the next one should have.

    Attributes:
        n: that number, from 1 to `most`.
    """

    def __init__(self, most: int) -> None:
        self.n = self.most = most
        self._wall = self._cpu = 0.0
        self._pause = _PAUSE
        self._try_at = 0.0
        self._is_trying = False

    def note(self, wall: float, cpu: float, now: float) -> bool:
        """Learn of a step; return whether `n` changed.

        Args:
            wall: seconds that it took.
            cpu: seconds of computing that all threads of the process got meanwhile.
            now: seconds of any steady clock.
        """
        self._wall += wall
        self._cpu += cpu
        if self._wall < _WINDOW:
            return False
        missing = self.n - self._cpu / self._wall
        self._wall = self._cpu = 0.0
        before = self.n
        if missing > _MISSING[0] + _MISSING[1] * self.n and self.n > 1:
            self.n -= 1
            self._pause = min(2 * self._pause, _MAX_PAUSE) if self._is_trying else _PAUSE
            self._try_at = now + self._pause
            self._is_trying = False
        elif self.n < self.most and now >= self._try_at:
            self.n += 1
            self._is_trying = True
        elif self._is_trying:  # and it went well
            self._is_trying, self._pause = False, _PAUSE
        return self.n != before


def times() -> tuple[float, float]:
    """Return a steady clock, and the computing time of the process, in seconds."""
    return time.perf_counter(), time.process_time()
