"""Clients of a server, of all kinds at once, and their own count of what they were answered."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import httpx

CHAT: Final = "/v1/chat/completions"
#: Nobody else asks here: of those who vanish or are killed, nobody can say what they were answered.
VANISHING: Final = "/v1/completions"
HI: Final = [{"role": "user", "content": "How are you?"}]
#: Forms and functions that answers may be bound to.
FORMS: Final[list[dict[str, Any]]] = [
    {"regex": "[a-z]{3,30}"},
    {"response_format": {"type": "json_object"}},
    {"schema": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 9}},
    {
        "tools": [{"type": "function", "function": {"name": "now"}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
]

# Asks for a stream, says that it began, and reads it to its end.
_STOPPED = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=120)
connection.sendall(sys.argv[2].encode())
connection.recv(100)
print(flush=True)
while connection.recv(65536):
    pass
"""


class Clients:
    """Threads that ask, each in its own order of kinds, until they are told to stop.

    Attributes:
        answered: responses that were read to their end, by path and status.
        failures: what went otherwise than it must.
    """

    def __init__(self, port: int, n: int) -> None:
        self.answered: Counter[tuple[str, int]] = Counter()
        self.failures: list[str] = []
        self._port = port
        self._ends = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(k,), daemon=True) for k in range(n)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let everyone finish what they are at."""
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        kinds: list[Callable[[httpx.Client, int], None]] = [
            self._ask, self._stream, self._form, self._message, self._ollama, self._llama,
            self._respond, self._err, self._read_slowly, self._look, self._vanish, self._be_stopped,
        ]  # fmt: skip
        with httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=300) as client:
            while not self._ends.is_set():
                number += 7  # prime to the kinds: all have their turn
                kind = kinds[number % len(kinds)]
                try:
                    kind(client, number)
                except (httpx.HTTPError, OSError, AssertionError) as error:
                    self.failures.append(f"{kind.__name__}: {error!r}"[:300])
                    time.sleep(0.1)

    def _expect(self, response: httpx.Response, status: int = 200) -> httpx.Response:
        with self._lock:
            self.answered[response.request.url.path, response.status_code] += 1
        assert response.status_code == status, response.text[:200]
        return response

    def _ask(self, client: httpx.Client, number: int) -> None:
        self._expect(client.post(CHAT, json=_asked(number)))

    def _stream(self, client: httpx.Client, number: int) -> None:
        asked = _asked(number, prefer="concise", stream=True)
        text = self._expect(client.post(CHAT, json=asked)).text
        assert text.rstrip().endswith("[DONE]"), text[-200:]

    def _form(self, client: httpx.Client, number: int) -> None:
        self._expect(client.post(CHAT, json=_asked(number, **FORMS[number % len(FORMS)])))

    def _message(self, client: httpx.Client, number: int) -> None:
        body = {"messages": HI, "max_tokens": 1 + number % 9, "stream": number % 2 == 0}
        self._expect(client.post("/v1/messages", json=body))

    def _ollama(self, client: httpx.Client, number: int) -> None:
        body = {"model": "any", "messages": HI, "options": {"num_predict": 9}, "stream": number % 2 == 0}
        self._expect(client.post("/api/chat", json=body))

    def _llama(self, client: httpx.Client, number: int) -> None:
        body = {"prompt": "The sea", "n_predict": 1 + number % 20, "stream": number % 2 == 0}
        self._expect(client.post("/completion", json=body))

    def _respond(self, client: httpx.Client, number: int) -> None:
        body = {"input": "Hi", "max_output_tokens": 16, "stream": number % 2 == 0}
        self._expect(client.post("/v1/responses", json=body))

    def _err(self, client: httpx.Client, number: int) -> None:
        body = [b"{", b"[]", b'{"messages": 5}', json.dumps(_asked(number, strength="x")).encode()]
        self._expect(client.post(CHAT, content=body[number % len(body)]), 400)

    def _look(self, client: httpx.Client, number: int) -> None:
        self._expect(client.get(("/health", "/v1/models", "/slots")[number % 3]))

    def _read_slowly(self, client: httpx.Client, number: int) -> None:
        with client.stream("POST", CHAT, json=_asked(number, stream=True)) as response:
            for _ in response.iter_raw(64):
                self._ends.wait(0.02)
        with self._lock:
            self.answered[CHAT, response.status_code] += 1

    def _vanish(self, client: httpx.Client, number: int) -> None:
        """Connect, ask, and go away at one point or another."""
        message = _message(_asked(number, max_tokens=400, n=2, stream=number % 2 == 0))
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            place = number % 5
            connection.sendall(message[: (0, len(message) // 2)[place] if place < 2 else None])
            if place > 2:
                connection.settimeout(0.3 * place)
                with contextlib.suppress(TimeoutError):
                    connection.recv(100)

    def _be_stopped(self, client: httpx.Client, number: int) -> None:
        """Be a process that is stopped while it reads, and goes on later, or is killed."""
        message = _message(_asked(number, max_tokens=400, stream=True)).decode()
        command = [sys.executable, "-I", "-S", "-c", _STOPPED, str(self._port), message]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            self._ends.wait(3)
            process.send_signal(signal.SIGCONT)
            if number % 2:
                process.kill()


def _asked(number: int, **more: Any) -> dict[str, Any]:
    asked = {"messages": HI, "max_tokens": 5 + number % 40, "seed": number, "temperature": 0.8}
    return {**asked, **more}


def _message(asked: dict[str, Any]) -> bytes:
    body = json.dumps({**asked, "prompt": "The sea", "messages": None}).encode()
    head = f"POST {VANISHING} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
