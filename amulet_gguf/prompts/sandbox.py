"""Chat templates that are not trusted are rendered in a process of their own.

No list of what a template can do is complete, and nothing stops an operation of Python's half-way: a
process can be ended, and what it took is given back. One is enough for all templates. Where none can be
started (see `amulet_gguf.system.child`), templates are rendered here, without bounds.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from amulet_gguf.errors import PromptError, TemplateLimitError
from amulet_gguf.system.child import can_start_children, frozen_command
from amulet_gguf.system.platforms import after_fork, apart

#: Characters of a template; real ones have a tenth of it.
MAX_TEMPLATE: Final = 262_144
#: Used for models that bring no template of their own, as llama.cpp does.
CHATML: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: SHA-256 of those that need no guard: CHATML, and the bundled model's.
_TRUSTED: Final = frozenset(
    {
        hashlib.sha256(CHATML.encode()).hexdigest(),
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
    }
)
_MAX_SECONDS: Final = 2.0  # a template works for milliseconds
_AT_ONCE: Final = 0.1  # seconds, within which a process that was there is found to be none
_MAX_START: Final = 60.0  # seconds until the process is ready; it takes a tenth of one
_START: Final = (
    "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
)


class Renderer:
    """A chat template, ready to render conversations."""

    def __init__(self, source: str) -> None:
        """Compile a template.

        Raises:
            PromptError: it is not valid.
            TemplateLimitError: it takes too long or too much memory.
        """
        if len(source) > MAX_TEMPLATE:
            raise PromptError(f"the chat template is too long: {len(source)} characters")
        self._source = source
        digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._is_guarded = digest not in _TRUSTED and can_start_children()
        self._render(None)

    def render(
        self, messages: Sequence[Mapping[str, Any]], now: datetime, arguments: Mapping[str, Any]
    ) -> str:
        """Return the text of a conversation, up to where the assistant is to speak.

        Args:
            now: what the template takes for the present.
            arguments: names that the template finds, with values that JSON knows.

        Raises:
            PromptError: the template refuses the conversation, or fails.
            TemplateLimitError: it takes too long or too much memory.
        """
        asked = {"add_generation_prompt": True, "messages": messages, "now": now.isoformat()}
        return self._render({**arguments, **asked})

    def _render(self, names: Mapping[str, Any] | None) -> str:
        if self._is_guarded:
            return _process.render(self._source, names)
        from amulet_gguf.prompts import rendering

        try:
            return rendering.render(self._source, names)
        except rendering.RefusedError as error:
            raise PromptError(f"the chat template {error}") from None


class _Process:
    """The process that renders, started when it is needed. For any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def render(self, source: str, names: Mapping[str, Any] | None) -> str:
        """Have a template rendered, as `amulet_gguf.prompts.rendering.render`.

        Raises:
            PromptError, TemplateLimitError: see `Renderer.render`.
        """
        request = json.dumps({"source": source, "names": names}).encode() + b"\n"
        with self.lock:
            reply = self._ask(request)
        if "limit" in reply:
            raise TemplateLimitError(f"the chat template {reply['limit']}")
        if "refused" in reply:
            raise PromptError(f"the chat template {reply['refused']}")
        return str(reply["text"])

    def close(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None

    def _ask(self, request: bytes) -> dict[str, str]:
        try:
            was_running = self._running is not None
            process = self._ready()
            began = time.monotonic()
            reply = _within(_MAX_SECONDS, process, request)
            if not reply and was_running and time.monotonic() - began < _AT_ONCE:
                self.close()  # somebody ended it while it was idle
                reply = _within(_MAX_SECONDS, self._ready(), request)
        except BaseException:  # Ctrl-C: the reply to this is not that to the next one
            self.close()
            raise
        if reply:
            answer: dict[str, str] = json.loads(reply)
        elif time.monotonic() - began >= _MAX_SECONDS:
            answer = {"limit": f"took more than {_MAX_SECONDS:g} seconds"}
        else:
            answer = {"limit": "ended the process that rendered it"}
        if "limit" in answer:
            self.close()
        return answer

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._running.poll() is not None:
            self.close()
            try:
                self._running = _start()
            except OSError as error:
                why = error.strerror
                raise PromptError(f"no process can be started for the chat template: {why}") from None
            if not _within(_MAX_START, self._running, b""):
                raise PromptError("the process that renders chat templates could not be started")
        return self._running


def _within(seconds: float, process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Write a request and return the line that comes back; empty where the process ends before it."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)  # pipes can be waited for without a limit alone
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return b""
    finally:
        timer.cancel()


def _start() -> subprocess.Popen[bytes]:
    """Start the process; Python has the standard library and Jinja, hardly more: it takes 50 ms."""
    command = frozen_command("rendering")
    if command is None:
        here = Path(__file__)
        origins = [getattr(find_spec(name), "origin", "") for name in ("jinja2", "markupsafe")]
        places = [here.parents[2], *(Path(origin).parents[1] for origin in origins)]
        program = here.with_name("rendering.py")
        command = [sys.executable, "-I", "-S", "-c", _START, *map(str, (program, *places))]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        **apart(),
    )


def _forget() -> None:
    """Leave the process to the parent of this one: they cannot share its pipes."""
    global _process
    _process = _Process()


@atexit.register
def _end() -> None:
    """End the process, unless a thread is using it that the interpreter does not wait for: its pipes are
    in use, and it ends with its input."""
    if _process.lock.acquire(blocking=False):
        _process.close()
        _process.lock.release()


_process = _Process()
after_fork(_forget)
