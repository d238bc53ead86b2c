"""llama.cpp's RPC servers: devices of other machines, for a model too large for one.

Whoever reaches such a server controls its process: they belong on networks of people you trust.
"""

from __future__ import annotations

import ctypes
import re
import socket
import struct
import threading
from importlib.metadata import version
from typing import Final

from amulet_gguf.errors import EngineError, SettingError
from amulet_gguf.system.platforms import searches_dependencies

_SERVER: Final = re.compile(
    r"(?P<host>[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):(?P<port>[0-9]{1,5})"
)
_MAX_SERVERS: Final = 16  # GGML_RPC_MAX_SERVERS
_TIMEOUT: Final = 10.0  # seconds for a server to greet back
_HELLO: Final = struct.pack("<BQ24x", 14, 24)  # command, size, abilities of the connection: none
_REPLY: Final = struct.pack("<QB", 28, 7)  # size, major version of the protocol
_GPU, _IGPU = 1, 2  # enum ggml_backend_dev_type; servers count as the first
_lock = threading.Lock()
_added: set[str] = set()


def parse_servers(text: str) -> list[str]:
    """Return the servers that "HOST:PORT,HOST:PORT" names, each once.

    Raises:
        SettingError: it names none, more than 16, or something else (IPv6 addresses among it).
    """
    servers = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for server in servers:
        match = _SERVER.fullmatch(server)
        if match is None or not 1 <= int(match["port"]) <= 65535:
            raise SettingError(f"an RPC server is HOST:PORT, as in 10.0.0.2:50052, got {server!r}")
    if len(servers) > _MAX_SERVERS:
        raise SettingError(f"at most {_MAX_SERVERS} RPC servers, got {len(servers)}")
    return servers


def add_servers(servers: list[str]) -> None:
    """Make the devices of RPC servers known to llama.cpp: every model loaded later is spread over them.

    Raises:
        SettingError: the installed llama.cpp was built without RPC.
        EngineError: a server cannot be reached, or is not one of this version.
    """
    from llama_cpp import llama_cpp

    if not llama_cpp.llama_supports_rpc():
        raise SettingError(
            "the installed llama.cpp has no RPC: CMAKE_ARGS='-DGGML_RPC=on' pip install --no-cache-dir "
            f"--force-reinstall llama-cpp-python=={version('llama-cpp-python')}"
        )
    ggml, base = library("ggml"), library("ggml-base")
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    by_name = ctypes.CFUNCTYPE(pointer, text)(("ggml_backend_reg_by_name", ggml))
    address = ctypes.CFUNCTYPE(pointer, pointer, text)(("ggml_backend_reg_get_proc_address", base))
    register = ctypes.CFUNCTYPE(None, pointer)(("ggml_backend_register", ggml))
    add = ctypes.CFUNCTYPE(pointer, text)(address(by_name(b"RPC"), b"ggml_backend_rpc_add_server"))
    with _lock:
        for server in servers:
            if server not in _added:
                greet(server)
                if not (backend := add(server.encode())):
                    raise EngineError(f"the RPC server {server} offers no device: see what it prints")
                register(backend)
                _added.add(server)


def greet(server: str) -> None:
    """Raise EngineError unless an RPC server of this version answers: llama.cpp would abort."""
    host, port = server.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), _TIMEOUT) as connection:
            connection.settimeout(_TIMEOUT)
            connection.sendall(_HELLO)
            reply = b""
            while len(reply) < len(_REPLY) and (data := connection.recv(64)):
                reply += data
    except (OSError, UnicodeError) as error:
        raise EngineError(
            f"no RPC server answers at {server} ({error}): start it there, or end its other client"
        ) from None
    if not reply.startswith(_REPLY):
        raise EngineError(
            f"{server} is no RPC server of the same llama.cpp version: use one build on both"
        )


def has_device() -> bool:
    """Tell whether llama.cpp knows a GPU, of this machine or of an RPC server."""
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)
    by_type = function(("ggml_backend_dev_by_type", library("ggml")))
    return bool(by_type(_GPU) or by_type(_IGPU))


def library(name: str) -> ctypes.CDLL:
    """Return a library whose functions are those that llama.cpp itself uses.

    pip installs copies where libggml.so has links: loaded by name, it is another one with a registry of
    its own. What libllama depends on is found through libllama, but on Windows.
    """
    from llama_cpp import _ctypes_extensions, _ggml, llama_cpp

    library: ctypes.CDLL = (
        llama_cpp._lib
        if searches_dependencies()
        else _ctypes_extensions.load_shared_library(name, _ggml.libggml_base_path)
    )
    return library
