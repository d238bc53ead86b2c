"""What differs between systems is asked of one module; its other branches are taken by substitution.

A system is substituted by what Python lacks there, and has there alone: as far as this one can be one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fixture_types import Tiny

import amulet_gguf
from amulet_gguf.models.trial import is_known
from amulet_gguf.system import platforms

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="substitutes the others for Linux")

PACKAGE = Path(amulet_gguf.__file__).parent
SYSTEMS = ("linux", "darwin", "win32")
#: Makes of this Python what it is on another system. What was imported before keeps what it has: most of
#: the standard library asks for the system when it is imported.
SUBSTITUTE = """
import asyncio, ctypes, getpass, os, select, shutil, signal, socket, subprocess, sys, tempfile, types
import filelock, llama_cpp, numba, psutil
from amulet_gguf.system import platforms

platforms.LINUX = False
del os.sched_getaffinity
if SYSTEM == "win32":
    platforms.WINDOWS = True
    for name in ("O_NONBLOCK", "O_DIRECTORY", "register_at_fork", "set_blocking", "getppid", "mkfifo"):
        delattr(os, name)
    for name in ("SIGHUP", "SIGALRM", "alarm", "pthread_sigmask"):
        delattr(signal, name)
    for name in ("fcntl", "termios", "resource"):
        sys.modules[name] = None
    signal.SIGBREAK = signal.SIGUSR1
    subprocess.CREATE_NO_WINDOW = 0x08000000
    class Popen(subprocess.Popen):
        def __init__(self, *arguments, creationflags=0, **options):
            assert creationflags == subprocess.CREATE_NO_WINDOW and "start_new_session" not in options
            super().__init__(*arguments, **options)
    subprocess.Popen = Popen
    # There, functions of ggml are found in its own libraries alone; here a copy would be another ggml.
    from llama_cpp import _ctypes_extensions as extensions
    load = extensions.load_shared_library
    extensions.load_shared_library = lambda name, folder: load(
        "llama" if name.startswith("ggml") else name, folder
    )
"""


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The system that this one passes for."""
    name: str = request.param
    if name == "linux":
        return name
    monkeypatch.setattr(platforms, "LINUX", False)
    monkeypatch.delattr(os, "sched_getaffinity")
    if name == "win32":
        monkeypatch.setattr(platforms, "WINDOWS", True)
        for each in ("O_NONBLOCK", "O_DIRECTORY", "register_at_fork", "set_blocking", "getppid"):
            monkeypatch.delattr(os, each)
        monkeypatch.delattr(signal, "SIGHUP")
        for each in ("fcntl", "termios", "resource"):
            monkeypatch.setitem(sys.modules, each, None)
        monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
        monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    return name


def test_nobody_else_asks_for_the_system() -> None:
    asks = re.compile(
        r"sys\.platform|os\.name\b|hasattr\((os|signal|subprocess)\b|getattr\((os|signal|subprocess)\b"
        r"|^\s*(import|from) (fcntl|grp|msvcrt|pty|pwd|resource|termios|tty|winreg)\b"
        r"|os\.(O_(?!WRONLY|RDONLY)|fork|getppid|getuid|kill|mkfifo|register_at_fork|sched_|set_blocking|setsid)"
        r"|signal\.(SIG(?!INT\b|TERM\b|_)[A-Z]|alarm|setitimer|pthread)|windll|CREATE_NO_WINDOW|start_new_session",
        re.MULTILINE,
    )
    found = {
        path.relative_to(PACKAGE).as_posix(): match[0]
        for path in PACKAGE.rglob("*.py")
        if (match := asks.search(path.read_text("utf-8")))
    }
    assert found.keys() == {"system/platforms.py"}


def test_cores_are_counted_where_a_process_is_bound_to_some(system: str) -> None:
    assert (platforms.usable_cores() is None) == (system != "linux")


def test_a_file_is_opened_and_its_name_kept(system: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    with open(path, "wb", opener=platforms.open_without_waiting) as file:
        file.write(b"all of it")
    platforms.sync_folder(tmp_path)
    platforms.sync_folder(tmp_path / "not there")
    assert path.read_bytes() == b"all of it"


def test_who_opens_a_pipe_that_nobody_reads_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device"):
        platforms.open_without_waiting(str(path), os.O_WRONLY)


def test_the_file_of_a_lock_goes_but_where_it_is_open(system: str, tmp_path: Path) -> None:
    path = tmp_path / "model.lock"
    path.touch()
    platforms.remove_lock(path)
    assert path.exists() == (system == "win32")


def test_functions_of_ggml_are_looked_for_where_they_can_be_found(system: str) -> None:
    assert platforms.searches_dependencies() == (system != "win32")


def test_a_process_is_started_apart(system: str) -> None:
    options = platforms.apart()
    if system == "win32":
        assert options == {"creationflags": 0x08000000}
        return
    program = "import os; print(os.getsid(0) == os.getpid())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **options)
    assert done.stdout == "True\n"


def test_something_is_forgotten_in_a_fork(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    if system != "win32":
        monkeypatch.setattr(os, "register_at_fork", lambda **callbacks: asked.append(callbacks))
    platforms.after_fork(forget := lambda: None)
    assert asked == ([] if system == "win32" else [{"after_in_child": forget}])


LIMITED = """
import mmap
from amulet_gguf.system import platforms
platforms.LINUX = SYSTEM == "linux"
platforms.fail_quietly()
platforms.end_after(1)
platforms.limit_memory(2 * 2**30)
try:
    mmap.mmap(-1, 8 * 2**30)
    print("had it", flush=True)
except OSError:
    print("bounded", flush=True)
import resource, time
print(resource.getrlimit(resource.RLIMIT_CORE)[0], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_process_has_limits(system: str) -> None:
    """With them set for real, in another one; who passes for macOS sets none of memory."""
    program = f"SYSTEM = {system!r}\n{LIMITED}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.stdout.split("\n")[:2] == ["bounded" if system == "linux" else "had it", "0"]
    assert -done.returncode == signal.SIGALRM


def test_what_windows_does_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    modes: list[int] = []
    kernel = SimpleNamespace(kernel32=SimpleNamespace(SetErrorMode=modes.append))
    monkeypatch.setattr(ctypes, "windll", kernel, raising=False)
    monkeypatch.setattr(platforms, "LINUX", False)
    monkeypatch.setattr(platforms, "WINDOWS", True)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(signal, "alarm")
    platforms.fail_quietly()
    platforms.end_after(1)
    platforms.limit_memory(1)
    assert platforms.stack_bytes() is None
    assert modes == [0x8003]


def test_threads_have_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    found = platforms.stack_bytes()
    assert found is not None
    assert found > 2**16
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert platforms.stack_bytes() == 2**21


def test_signals_are_those_that_there_are_and_that_are_heeded(system: str) -> None:
    second = "SIGBREAK" if system == "win32" else "SIGHUP"
    both = [signal.SIGTERM, getattr(signal, second)]
    assert platforms.heeded(*platforms.ENDING) == both
    before = signal.signal(both[1], signal.SIG_IGN)
    try:
        assert platforms.heeded(*platforms.ENDING) == both[:1]
    finally:
        signal.signal(both[1], before)


def test_the_end_of_a_pipe_is_waited_for(system: str) -> None:
    end, other = os.pipe()
    thread = threading.Thread(target=platforms.wait_for_end, args=(end,))
    thread.start()
    os.write(other, b"not yet")
    thread.join(0.2)
    assert thread.is_alive()
    os.close(other)
    thread.join(10)
    assert not thread.is_alive()
    os.close(end)


def test_what_waits_in_a_pipe_is_seen(system: str, tmp_path: Path) -> None:
    end, other = os.pipe()
    assert not platforms.has_unread(end)
    os.write(other, b"x")
    if system != "win32":
        assert platforms.has_unread(end)
    os.read(end, 1)
    os.close(other)
    assert not platforms.has_unread(end)  # though it can be read to its end
    os.close(end)
    with open(tmp_path / "file", "wb+") as file:
        file.write(b"x")
        file.seek(0)
        assert not platforms.has_unread(file.fileno())


def test_a_terminal_keeps_keys_where_it_has_that_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    import termios

    end, other = os.openpty()
    with open(other, encoding="utf-8") as terminal, contextlib.closing(io.FileIO(end)):
        lines = [termios.tcgetattr(terminal)[3] & termios.ICANON]
        with platforms.key_by_key(terminal):
            lines.append(termios.tcgetattr(terminal)[3] & termios.ICANON)
        lines.append(termios.tcgetattr(terminal)[3] & termios.ICANON)
        assert lines == [termios.ICANON, 0, termios.ICANON]
        monkeypatch.setattr(platforms, "WINDOWS", True)
        monkeypatch.setitem(sys.modules, "termios", None)
        with platforms.key_by_key(terminal):
            pass


def amulet(system: str, *arguments: str) -> list[str]:
    run = f"from amulet_gguf.cli import main\nmain({list(arguments)!r})"
    return [sys.executable, "-c", f"SYSTEM = {system!r}\n{SUBSTITUTE}\n{run}"]


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_a_new_file_is_tried_and_answers(
    system: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command to the answer, with a model file and a template that are not trusted."""
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "home"))
    arguments = ("-m", str(tiny("llama")), "-c", "512", "--prefer", "concise", "-n", "4", "--json")
    command = amulet(system, "generate", "What is the sea?", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"]
    assert is_known(tiny("llama"))


@pytest.mark.parametrize("system", ["darwin", "win32"])
@pytest.mark.parametrize("by", ["signal", "stdin", "parent"])
def test_elsewhere_a_server_ends_with_its_parent_and_by_a_signal(
    system: str, by: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "home"))
    options = ("-c", "512", "--port", "0", "--ready-json", "--exit-with-parent", "--trust-model")
    command = amulet(system, "serve", "-m", str(tiny("llama")), *options)
    stdin = subprocess.PIPE if by == "stdin" else subprocess.DEVNULL
    if by == "parent":
        start = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
        command = [sys.executable, "-c", start, *command]
    with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        about = json.loads(process.stdout.readline())
        assert httpx.get(f"{about['url']}/health", timeout=60).status_code in (200, 503)
        if by == "stdin":
            assert process.stdin is not None
            process.stdin.close()
        elif by == "parent":
            process.kill()
            process.wait()  # nothing is left of it, as on Windows
        else:
            process.send_signal(signal.SIGUSR1 if system == "win32" else signal.SIGTERM)  # Ctrl-Break
        assert process.stdout.read() == ""  # whoever held it is gone
