"""`amulet serve` inside another program: how it begins, what it survives, and that it ends."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixture_types import Tiny
from serving import until

from amulet_gguf.errors import SettingError
from amulet_gguf.server import logs
from amulet_gguf.server.logs import LossyWriter, begin_logging

pytestmark = pytest.mark.timeout(90)
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

SERVE = ("-m", "amulet_gguf", "serve")
DEMO = Path(__file__).parents[2] / "scripts" / "sidecar_demo.mjs"
#: The command, with a model that stays at 42 % until a file is there.
GATED = """
import sys, time
from pathlib import Path
from amulet_gguf.amulet import Amulet
from amulet_gguf.cli import main
from amulet_gguf.server import ending

gate, seconds = sys.argv.pop(1), float(sys.argv.pop(1))
load = Amulet.load

def slow(path, *, progress, **options):
    progress(0.42)
    while not Path(gate).exists():
        time.sleep(0.01)
    return load(path, progress=progress, **options)

Amulet.load = slow
ending.END_SECONDS = seconds
main(["serve", *sys.argv[1:]])
"""
#: Starts what its arguments say, and waits.
PARENT = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"


class Served:
    """A server in a process, which has said where it listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()
        self.about: dict[str, Any] = json.loads(self._lines.get(timeout=60))
        self.url: str = self.about["url"]

    def _read(self, stdout: Any) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put("")  # nobody is left to write

    def rest(self, timeout: float = 20) -> str:
        """Wait for the end of all that hold stdout, and return the line before it, or nothing."""
        return self._lines.get(timeout=timeout)

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=20)

    def wait_ready(self) -> None:
        until(lambda: self.health().status_code == 200)


@pytest.fixture
def arguments(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    monkeypatch.delenv("AMULET_API_KEY", raising=False)
    return ["-m", str(tiny("llama")), "-c", "512", "-t", "1", "--port", "0", "--ready-json"]


@contextlib.contextmanager
def started(*command: str, **options: Any) -> Iterator[Served]:
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, **options)
    try:
        yield Served(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def gated(
    gate: Path, arguments: Sequence[str], seconds: float = 0.8, **options: Any
) -> Iterator[Served]:
    with started("-c", GATED, str(gate), str(seconds), *arguments, **options) as served:
        yield served


def chat(served: Served, **options: Any) -> contextlib.AbstractContextManager[httpx.Response]:
    asked = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 450,
        "stream": True,
        "stop": ["\0"],
    }
    return httpx.stream("POST", f"{served.url}/v1/chat/completions", json=asked, timeout=30, **options)


def default_signals() -> None:
    """Undo what a test run in the background inherits."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_one_line_of_json_says_where_it_listens(arguments: list[str]) -> None:
    with started(*SERVE, *arguments) as served:
        about = served.about
        assert sorted(about) == ["model", "pid", "port", "url"]
        assert about["url"] == f"http://127.0.0.1:{about['port']}"
        assert about["model"] == "llama"
        assert about["pid"] == served.process.pid
        served.wait_ready()
        with chat(served) as answer:
            assert answer.status_code == 200
            answer.read()
        served.process.terminate()
        assert served.rest() == ""


def test_health_tells_how_much_is_loaded(arguments: list[str], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with gated(gate, [*arguments, "--api-key", "secret"]) as served:
        until(lambda: served.health().json() == {"status": "loading", "progress": 0.42})
        assert served.health().status_code == 503
        with httpx.Client(base_url=served.url, timeout=20) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
            assert client.get("/health", headers={"origin": "http://evil.example"}).status_code == 403
            client.headers["authorization"] = "Bearer secret"
            for path in ("/v1/models", "/v1/chat/completions", "/nowhere", "/"):
                answer = client.post(path, json={}) if "chat" in path else client.get(path)
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
                assert answer.json()["error"]["code"] == "loading"
            gate.touch()
            served.wait_ready()
            assert served.health().json() == {"status": "ok"}
            assert client.get("/v1/models").status_code == 200


def test_a_model_that_cannot_be_loaded_ends_it(arguments: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    done = subprocess.run(
        [sys.executable, *SERVE, *arguments, "-m", str(bad)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["model"] == "bad"
    assert len(done.stderr.splitlines()) == 1
    assert "bad.gguf" in done.stderr


@posix
def test_nobody_has_to_read_stderr(arguments: list[str]) -> None:
    with started(*SERVE, *arguments) as served:
        served.wait_ready()
        with httpx.Client(base_url=served.url, timeout=20) as client:
            for _ in range(3000):
                assert client.get("/nowhere").status_code == 404
        served.process.terminate()
        assert served.process.wait(20) == -signal.SIGTERM


@posix
def test_the_log_has_a_file_and_a_level(arguments: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    for level, is_told in (("info", True), ("error", False)):
        with started(*SERVE, *arguments, "--log-file", str(log), "--log-level", level) as served:
            httpx.get(f"{served.url}/{level}-nowhere", timeout=20)
            served.process.terminate()
            served.rest()
            assert "nowhere" not in served.process.communicate()[1]
        lines = log.read_text().splitlines()
        assert lines[0] == "before"
        assert any(f"/{level}-nowhere" in line for line in lines) == is_told


@posix
def test_it_ends_with_its_parent(arguments: list[str]) -> None:
    command = [sys.executable, *SERVE, *arguments, "--exit-with-parent"]
    with started("-c", PARENT, *command, stderr=subprocess.DEVNULL) as served:
        served.wait_ready()  # stdin says nothing
        served.process.kill()
        assert served.rest() == ""


def test_it_ends_with_stdin(arguments: list[str]) -> None:
    with started(*SERVE, *arguments, "--exit-with-parent", stdin=subprocess.PIPE) as served:
        assert served.process.stdin is not None
        served.process.stdin.write("what is written is not read as anything\n")
        served.process.stdin.flush()
        served.wait_ready()
        served.process.stdin.close()
        assert served.process.wait(20) == 0
        served.process.stdin = None
        assert "the parent is gone" in served.process.communicate()[1]


def test_it_ends_with_stdin_while_it_loads(arguments: list[str], tmp_path: Path) -> None:
    options = [*arguments, "--exit-with-parent"]
    with gated(tmp_path / "never", options, stdin=subprocess.PIPE) as served:
        assert served.process.stdin is not None
        served.process.stdin.close()
        assert served.process.wait(20) == 0


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_end_it_in_the_middle_of_streams(name: str, arguments: list[str]) -> None:
    with started(*SERVE, *arguments, preexec_fn=default_signals) as served:
        served.wait_ready()
        address = ("127.0.0.1", served.about["port"])
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        with (
            socket.create_connection(address) as idle,
            socket.create_connection(address, timeout=20) as late,
            chat(served) as hanging,  # is never read
            chat(served) as answer,
        ):
            idle.sendall(head)  # and nothing more
            late.sendall(head + b"content-length: 9\r\n\r\n")
            lines = answer.iter_lines()
            next(lines)
            number = getattr(signal, name)
            served.process.send_signal(number)
            with contextlib.suppress(httpx.RemoteProtocolError):
                list(lines)
            code = served.process.wait(20)
            assert code in (-number, 128 + number)
            assert hanging.status_code == 200
            if code != 128 + number:  # it was not cut off; but an interrupt looks the same
                assert b"the server is closing" in late.recv(10_000)
        assert served.rest() == ""
        assert "Traceback" not in served.process.communicate()[1]


@posix
def test_a_signal_ends_it_while_it_loads(arguments: list[str], tmp_path: Path) -> None:
    with gated(tmp_path / "never", arguments) as served:
        served.process.terminate()
        assert served.process.wait(20) == 128 + signal.SIGTERM


@posix
def test_the_second_interrupt_ends_it_at_once(arguments: list[str], tmp_path: Path) -> None:
    with gated(tmp_path / "never", arguments, 600, preexec_fn=default_signals) as served:
        served.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            served.process.wait(1)  # its model is being loaded, and does not know
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(20) == 128 + signal.SIGINT


@posix
def test_nohup_is_respected(arguments: list[str]) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started(*SERVE, *arguments, preexec_fn=ignore) as served:
        served.process.send_signal(signal.SIGHUP)
        served.wait_ready()


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the example for other languages."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    command = ["node", DEMO, sys.executable, *SERVE, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", timeout=80)


@pytest.mark.model
def test_the_example_asks_streams_adjusts_and_ends(real_model: Path) -> None:
    done = demo("-m", real_model, "-c", 512)
    assert done.returncode == 0, done.stderr
    whole, stream = done.stdout.split("Uplifting")
    assert all(len(text.split()) > 10 for text in (whole, *stream.split("[strength 3]")))
    assert "[strength 3]" in stream
    assert stream.endswith("\n\nThe server has ended: 0\n")


def test_the_example_tells_why_there_is_no_server(tmp_path: Path) -> None:
    done = demo("-m", tmp_path / "none.gguf")
    assert done.returncode == 1
    assert "none.gguf" in done.stderr
    assert done.stderr.endswith("the server has ended: 1\n")


def test_what_nobody_reads_is_lost_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 10)
    reader, pipe = os.pipe()
    with open(reader, "rb") as source, open(pipe, "wb", buffering=0) as target:
        writer = LossyWriter(target)
        texts = [f"{number} {'x' * 999}\n" for number in range(1000)]
        for text in texts:
            assert writer.write(text) == len(text)
        writer.drain(0.01)
        got = []
        while "lost" not in (line := source.readline().decode()):
            got.append(line)
        assert got == texts[: len(got)]
        assert int(line.removeprefix("(").split()[0]) == len(texts) - len(got)
        writer.write("again\n")
        assert source.readline() == b"again\n"


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot write"):
        begin_logging("info", str(tmp_path / "no" / "log"))
