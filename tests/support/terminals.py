"""A chat on a real pseudo-terminal, and the screen to read it from."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable

import pexpect
import pyte

CHAT = [sys.executable, "-m", "amulet_gguf", "chat"]


class Terminal:
    """A screen, and what runs on it."""

    def __init__(self, *arguments: str, **env: str) -> None:
        variables = {**os.environ, "TERM": "xterm-256color", **env}
        self.screen = pyte.HistoryScreen(100, 40, history=2000, ratio=1)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.n_prompts = 1
        self._child: pexpect.spawn[bytes] = pexpect.spawn(
            CHAT[0], [*CHAT[1:], *arguments], env=variables, dimensions=(40, 100), timeout=60
        )

    @property
    def pid(self) -> int:
        return int(self._child.pid or 0)

    @property
    def text(self) -> str:
        history = ["".join(line[x].data for x in range(100)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*history, *self.screen.display])

    def read(self, seconds: float = 0.05) -> None:
        try:
            data = self._child.read_nonblocking(65536, timeout=seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.raw += data
        self._stream.feed(data)
        if b"\x1b[6n" in data:  # a question of the line editor: where is the cursor?
            row, column = self.screen.cursor.y + 1, self.screen.cursor.x + 1
            self._child.send(f"\x1b[{row};{column}R")

    def until(self, condition: str | Callable[[str], bool], seconds: float = 60) -> None:
        """Read the screen until a pattern is on it, or a condition holds."""
        deadline = time.monotonic() + seconds
        while True:
            text = self.text
            if re.search(condition, text) if isinstance(condition, str) else condition(text):
                return
            assert time.monotonic() < deadline, f"no {condition} in\n{text}"
            self.read()

    def shows(self, pattern: str) -> bool:
        """Tell whether a pattern is on the screen; what went over its upper edge does not count."""
        return (
            re.search(pattern, "\n".join(map(str.rstrip, self.screen.display)), re.MULTILINE) is not None
        )

    def until_screen(self, pattern: str, seconds: float) -> None:
        self.until(lambda _: self.shows(pattern), seconds)

    def forget(self) -> None:
        """Keep nothing but the screen."""
        self.raw = b""
        self.screen.history.top.clear()

    def ready(self) -> None:
        """Wait for the prompt that follows what was said so far."""

        def is_ready(text: str) -> bool:
            last = re.search(r"^> *\n+.* of [\d,]+ tokens\Z", text.rstrip(), re.MULTILINE)
            return len(re.findall(r"^> ?", text, re.MULTILINE)) == self.n_prompts and bool(last)

        self.until(is_ready, 20)

    def say(self, line: str) -> None:
        self.n_prompts += 1
        self._child.send(line + "\r")

    def press(self, keys: str) -> None:
        self._child.send(keys)

    def signal(self, number: int) -> None:
        self._child.kill(number)

    def close(self) -> None:
        """Take the terminal away, and wait for the process."""
        self._child.ptyproc.fileobj.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 20
        while self._child.isalive():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> int:
        deadline = time.monotonic() + 20
        while self._child.isalive():
            assert time.monotonic() < deadline, self.text
            self.read()
        self._child.close()
        return int(self._child.exitstatus if self._child.exitstatus is not None else -1)

    def kill(self) -> None:
        self._child.kill(signal.SIGKILL)  # a chat may well end in order on less, but not at once
        self._child.close()
