"""RPC servers: what is refused before llama.cpp, which would end the process, sees it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixture_types import Tiny

from amulet_gguf.cli import main
from amulet_gguf.errors import EngineError, SettingError
from amulet_gguf.llama import rpc
from amulet_gguf.llama.model import Model, can_offload, lib
from amulet_gguf.llama.rpc import add_servers, greet, parse_servers

without_rpc = pytest.mark.skipif(lib.llama_supports_rpc(), reason="this llama.cpp has RPC")


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("localhost:50052", ["localhost:50052"]),
        ("10.0.0.2:1, a-b.example:65535", ["10.0.0.2:1", "a-b.example:65535"]),
        ("a:1,a:1", ["a:1"]),
        (",".join(f"h{n}:1" for n in range(16)), [f"h{n}:1" for n in range(16)]),
    ],
)
def test_servers_are_hosts_and_ports(text: str, servers: list[str]) -> None:
    assert parse_servers(text) == servers


@pytest.mark.parametrize(
    "text",
    ["", ",", "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1,", "a:1:2", "[::1]:1", "-a:1", "a b:1",
     "a\0:1", "a:١", "http://a:1", "a/b:1", "é:1", f"{'a' * 300}:1",
     ",".join(f"h{n}:1" for n in range(17))],
)  # fmt: skip
def test_other_texts_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_servers(text)
    assert "\n" not in str(caught.value)


@contextmanager
def listener(reply: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that says `reply` to whoever comes, and then hangs up."""
    heard: list[bytes] = []

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            heard.append(connection.recv(64))
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", heard
        thread.join()


def test_a_server_of_this_version_is_greeted_as_llama_cpp_greets() -> None:
    # What llama.cpp's own client sends and its server of protocol 7.0.0 answers.
    with listener(b"\x1c" + bytes(7) + b"\x07" + bytes(27)) as (server, heard):
        greet(server)
    assert heard == [b"\x0e\x18" + bytes(7) + bytes(24)]


@pytest.mark.parametrize(
    "reply",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x03" + bytes(7) + b"\x03\0\0",
     b"\x1c" + bytes(7) + b"\x06" + bytes(27), b"\x1c"],
)  # fmt: skip
def test_other_servers_are_refused(reply: bytes) -> None:
    with (
        listener(reply) as (server, _),
        pytest.raises(EngineError, match="no RPC server of the same"),
    ):
        greet(server)


def test_silence_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(EngineError, match="no RPC server answers at"):
            greet(f"127.0.0.1:{port}")
    with pytest.raises(EngineError, match="no RPC server answers at"):
        greet(f"127.0.0.1:{port}")  # nobody listens any more
    with pytest.raises(EngineError, match="no RPC server answers at"):
        greet(f"{'a' * 70}.invalid:1")  # longer than a name in the network can be


@without_rpc
def test_without_rpc_the_cure_is_named(tiny: Tiny) -> None:
    with pytest.raises(SettingError, match=r"has no RPC: CMAKE_ARGS='-DGGML_RPC=on' pip install"):
        add_servers(["localhost:50052"])
    with pytest.raises(SettingError, match="has no RPC"):
        Model(tiny("llama"), rpc="localhost:50052")
    with pytest.raises(SettingError, match="is HOST:PORT"):
        Model(tiny("llama"), rpc="localhost")
    result = CliRunner().invoke(main, ["generate", "hi", "-m", str(tiny("llama")), "--rpc", "h:1"])
    assert result.exit_code == 2
    assert "has no RPC" in result.stderr
    assert rpc.has_device() == can_offload() == bool(lib.llama_supports_gpu_offload())


def test_ray_and_rpc_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("{}")
    result = CliRunner().invoke(
        main, ["batch", f"{tmp_path}/in", "-o", f"{tmp_path}/out", "--ray", "auto", "--rpc", "h:1"]
    )
    assert result.exit_code == 2
    assert "choose" in result.stderr
