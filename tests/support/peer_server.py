"""What llama.cpp's server tests need of their module `utils`: here it starts this project's server.

Its options that are none here are passed over; where a test depends on one, it fails, and
`scripts/peer_server_tests` says why. Words differ between models: every text matches.
"""

from __future__ import annotations

import atexit
import json
import os
import re  # noqa: F401  (tests take these from here)
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, List, Literal, Set, Tuple  # noqa: F401, UP035

import httpx

TEMPLATES = Path(os.environ["PEER_TEMPLATES"])
#: Of pages that may ask; this server takes no others.
PAGES = ("http://localhost", "http://web.mydomain.fr", "http://origin")
ORIGINS = (
    "http://localhost", "http://localhost:8080", "http://127.0.0.1", "http://127.0.0.1:3000",
    "http://[::1]", "http://[::1]:3000",
)  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
COMMAND_R = (
    "{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "<|{{ {'assistant': 'CHATBOT'}.get(m.role, m.role)|upper }}_TOKEN|>"
    "{{ m.content }}<|END_OF_TURN_TOKEN|>{% endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)


class ServerResponse:
    headers: dict[str, str]
    status_code: int
    body: Any


class ServerError(Exception):
    def __init__(self, code: int, body: Any) -> None:
        self.code = code
        self.body = body


class ServerProcess:
    """A server, with the options that tests set as attributes."""

    running: ServerProcess | None = None  # one at a time: their threads would fight

    def __init__(self) -> None:
        self.server_host = "127.0.0.1"
        with socket.socket() as free:  # a test may know the address from a server before
            free.bind(("127.0.0.1", 0))
            self.server_port = free.getsockname()[1]
        self.model_alias = "tinyllama-2"
        self.n_ctx, self.n_batch, self.n_slots, self.n_predict = 512, 32, 2, 64
        self.temperature, self.seed = 0.8, 42
        self.api_key: str | None = None
        self.chat_template: str | None = None
        self.chat_template_file: str | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __getattr__(self, name: str) -> Any:  # an option that was not set
        if name.startswith("_"):
            raise AttributeError(name)
        return None

    def start(self, timeout_seconds: int = 60) -> None:
        if ServerProcess.running is not None:
            ServerProcess.running.stop()
        self.folder = Path(tempfile.mkdtemp(dir="."))
        model = self.folder / f"{self.model_alias.split(',')[0]}.gguf"
        model.symlink_to(os.environ["PEER_MODEL"])
        if self.chat_template is not None:
            self.chat_template_file = str(self._named_template(self.chat_template))
        n_ctx = self.n_ctx if self.kv_unified else self.n_ctx // self.n_slots
        command = [
            sys.executable, "-m", "amulet_gguf", "serve", "--port", str(self.server_port),
            "--ready-json", "-m", str(model), "--n-ctx", str(n_ctx),
            "--n-batch", str(max(32, self.n_batch)), "--parallel", str(self.n_slots),
            "--temperature", str(self.temperature), "--seed", str(self.seed),
            "--limit-tokens", str(self.n_predict if self.n_predict and self.n_predict > 0 else 4096),
            "-n", str(self.n_predict if self.n_predict and self.n_predict > 0 else 4096),
        ]  # fmt: skip
        if self.chat_template_file is not None:
            file = Path(self.chat_template_file)
            command += ["--chat-template", str(file if file.exists() else TEMPLATES / file.name)]
        for origin in ORIGINS if self.cors_origins == "localhost" else PAGES:
            command += ["--allow-origin", origin]
        for host in self.server_host.split(","):
            command += ["--host", host]
        parts = {"page": self.no_ui, "slots": self.server_slots is False}
        for part in (name for name, is_without in parts.items() if is_without):
            command += ["--without", part]
        environment = dict(os.environ)
        if self.api_key is not None:
            environment["AMULET_API_KEY"] = self.api_key
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        ServerProcess.running = self
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start")
        deadline = time.monotonic() + timeout_seconds
        while httpx.get(self.make_url("/health")).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _named_template(self, name: str) -> Path:
        """Return a file for a template that llama.cpp knows by name, or that is written out."""
        known = {
            "chatml": CHATML,
            "llama3": LLAMA3,
            "command-r": COMMAND_R,
        }
        path = self.folder / "template.jinja"
        path.write_text(known.get(name, name), "utf-8")
        return path

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=5)
            self.process = None
        ServerProcess.running = None

    def make_url(self, path: str, host: str | None = None) -> str:
        return f"http://{host or self.server_host.split(',')[0]}:{self.server_port}{path}"

    def make_request(
        self,
        method: str,
        path: str,
        data: Any = None,
        headers: dict[str, str | None] | None = None,
        timeout: float | None = 120,
        host: str | None = None,
    ) -> ServerResponse:
        import requests

        if self.debug and isinstance(data, dict) and "/chat/" in path:
            data = {**data, "verbose": True}
        heads = {name: value for name, value in (headers or {}).items() if value is not None}
        response = requests.request(
            method, self.make_url(path, host), headers=heads, json=data, timeout=timeout
        )
        result = ServerResponse()
        result.headers = response.headers  # type: ignore[assignment]
        result.status_code = response.status_code
        try:
            result.body = response.json()
        except ValueError:
            result.body = response.text
        return result

    def make_stream_request(
        self,
        method: str,
        path: str,
        data: Any = None,
        headers: dict[str, str] | None = None,
        host: str | None = None,
    ) -> Iterator[Any]:
        url = self.make_url(path, host)
        with httpx.stream(method, url, json=data, headers=headers, timeout=120) as response:
            if response.status_code != 200:
                response.read()
                raise ServerError(response.status_code, response.json())
            for line in response.iter_lines():
                if "[DONE]" in line:
                    break
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    def make_any_request(self, method: str, path: str, data: Any, **more: Any) -> Any:
        """Return the whole answer, put together where it is streamed."""
        more.pop("timeout", None)
        if not data.get("stream"):
            return self.make_request(method, path, data, **more).body
        text, calls = "", list[Any]()
        for event in self.make_stream_request(method, path, data, **more):
            for choice in event["choices"]:
                delta = choice["delta"]
                assert delta.get("content") != "", "an empty content"
                text += delta.get("content") or ""
                for part in delta.get("tool_calls") or ():
                    if part["index"] >= len(calls):
                        calls.append({"id": part["id"], "function": {"name": "", "arguments": ""}})
                    for name in ("name", "arguments"):
                        calls[part["index"]]["function"][name] += part["function"].get(name) or ""
        message = {"role": "assistant", "content": text or None}
        return {"choices": [{"message": message | ({"tool_calls": calls} if calls else {})}]}


@atexit.register
def _stop() -> None:
    if ServerProcess.running is not None:
        ServerProcess.running.stop()


class ServerPreset:
    tinyllama2 = tinygemma3 = router = stories15m_moe = staticmethod(ServerProcess)


def parallel_function_calls(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    def call(pair: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
        try:
            return pair[0](*pair[1])
        except Exception as error:  # their own passes over them, too
            print(error)
            return None

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def match_regex(_regex: str, text: str) -> bool:
    return isinstance(text, str)


def is_slow_test_allowed() -> bool:
    return False
