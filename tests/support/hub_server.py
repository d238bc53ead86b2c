"""A server on this machine that behaves like the hub, and fails like it when told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

TOKEN = "hf_secret"


@dataclass
class Hub:
    """What is served, and what goes wrong.

    Attributes:
        files: by "OWNER/REPO/FILE".
        drop_after: bytes of a file after which connections break, one for each.
        gated, private: repositories that need `TOKEN`.
        lie: files whose digest is said wrong.
        pause: seconds between pieces of a file.
        ignores_ranges: a range is answered with the whole file.
        surplus: bytes that follow each file.
        asked: (path, range) of every file that was sent.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    drop_after: list[int] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    lie: set[str] = field(default_factory=set)
    pause: float = 0.0
    ignores_ranges: bool = False
    surplus: bytes = b""
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def digest(self, name: str) -> str:
        return hashlib.sha256(self.files[name] + b"?" * (name in self.lie)).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(self.path.partition("?")[0])
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/main)?", path):
            self._info(hub, match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path):
            repo, name = match[1], f"{match[1]}/{match[2]}"
            if self._refuses(hub, repo):
                return
            if name not in hub.files:
                self._answer(404, {"X-Error-Code": "EntryNotFound"})
                return
            # As on the hub, the file itself comes from elsewhere.
            self._answer(
                302, {"Location": f"{hub.url}/cdn/{quote(name)}", "ETag": f'"{hub.digest(name)}"'}
            )
        elif path.startswith("/cdn/"):
            self._send(hub, path.removeprefix("/cdn/"))
        else:
            self._answer(404, {})

    def _refuses(self, hub: Hub, repo: str) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        if repo in hub.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
            return True
        if repo in hub.private or not any(name.startswith(f"{repo}/") for name in hub.files):
            self._answer(401, {"X-Error-Code": "RepoNotFound"})
            return True
        return False

    def _info(self, hub: Hub, repo: str) -> None:
        is_hidden = repo in hub.private or not any(name.startswith(f"{repo}/") for name in hub.files)
        if is_hidden and self._refuses(hub, repo):
            return
        siblings = [
            {
                "rfilename": name.removeprefix(f"{repo}/"),
                "size": len(data),
                "lfs": {"sha256": hub.digest(name), "size": len(data), "pointerSize": 134},
            }
            for name, data in hub.files.items()
            if name.startswith(f"{repo}/")
        ]
        body = json.dumps({"id": repo, "modelId": repo, "sha": "0" * 40, "siblings": siblings})
        self._answer(200, {"Content-Type": "application/json"}, body.encode())

    def _send(self, hub: Hub, name: str) -> None:
        data = hub.files[name] + hub.surplus
        wanted = self.headers.get("Range")
        hub.asked.append((name, wanted))
        start = 0
        if wanted and not hub.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        limit = start + hub.drop_after.pop(0) if hub.drop_after else len(data)
        try:
            while start < min(limit, len(data)):
                end = min(start + 2**20, limit, len(data))
                self.wfile.write(data[start:end])
                start = end
                time.sleep(hub.pause)
        except OSError:  # the client went away
            pass
        if start < len(data):
            self.close_connection = True
            self.connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, *_: object) -> None:
        pass  # broken connections are what it is for


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve on loopback until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
