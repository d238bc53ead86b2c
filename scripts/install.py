"""Usage: install.py EXTRA | --wheel

Installs the project with an extra into the environment of the Python that runs this. With --wheel,
writes where the wheel of llama.cpp is, and installs nothing.

llama.cpp is compiled before that: only the libraries that are loaded, with progress, in a folder of the
user's cache that is kept until it is done. Interrupted, it goes on there. The wheel stays, for the next
environment.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
ROOT = Path(__file__).resolve().parent.parent
#: Bytes that llama.cpp's source, its objects and the wheel take.
ROOM = 700 * 10**6

_COMPILER = (
    "install a C++ compiler: apt install build-essential (Debian, Ubuntu), dnf install gcc-c++\n"
    "(Fedora), xcode-select --install (macOS)"
)
#: What a log shows, and what helps. The first that is found counts.
CURES = (
    (r"No CMAKE_C\w*_COMPILER could be found|no developer tools were found", _COMPILER),
    (
        r"No space left on device|Disk quota exceeded",
        "make room; TMPDIR and XDG_CACHE_HOME name other places",
    ),
    (
        r"[Kk]illed|Cannot allocate memory|virtual memory exhausted|out of memory",
        "memory ran out: CMAKE_BUILD_PARALLEL_LEVEL=1 compiles one file at a time",
    ),
    (
        r"NewConnectionError|ConnectTimeout|ProxyError|SSLError|name resolution|No matching dist",
        "the Python package index must be reachable (HTTPS_PROXY, PIP_INDEX_URL) and have the package",
    ),
    (
        r"Could not find CMake|CMake \d\S* or higher is required|ninja\S* not found",
        "install CMake and Ninja: apt install cmake ninja-build, brew install cmake ninja",
    ),
)
_TELLING = re.compile(
    "|".join(pattern for pattern, _ in CURES) + r"|error:|CMake Error|^FAILED|could be found|ERROR: "
)
_STEP = re.compile(r"\s*\[(\d+)/(\d+)\] ")  # ninja's


class InstallError(Exception):
    """Something could not be installed; the message says why and what helps, in a few lines."""


def say(text: str) -> None:
    print(f"amulet: {text}", file=sys.stderr, flush=True)


def explain(log: str) -> str:
    """Return the lines of a log that matter, and the cure where one is known."""
    lines = [line.strip() for line in log.splitlines()]
    telling = list(dict.fromkeys(line[:300] for line in lines if _TELLING.search(line)))
    cures = [cure for pattern, cure in CURES if re.search(pattern, log)]
    return "\n".join([*(f"  {line}" for line in telling[:8] or lines[-5:]), *cures[:1]])


class Progress:
    """Shows how far ninja is: on a terminal in one line that changes, elsewhere at every tenth.

    Args:
        title: what is being made.
        stream: where it is shown.
        clock: seconds.
    """

    def __init__(
        self, title: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._stream = stream or sys.stderr
        self._clock = clock
        self._begin: float | None = None
        self._tenth = -1
        self._total = 0

    def read(self, line: str) -> None:
        """Take a line of ninja's output, or any other."""
        step = _STEP.match(line)
        done, total = (int(step[1]), int(step[2])) if step else (0, 0)
        if done == 0 or total < self._total:  # before the first step, or in a build within the build
            return
        self._total = total
        if self._begin is None:
            self._begin = self._clock()
        seconds = (self._clock() - self._begin) * (total - done) / done
        text = f"amulet: {self._title}: {done} of {total} steps{_left(seconds) if done > 2 else ''}"
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{text}")
        elif 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._begin is not None and self._stream.isatty():
            self._stream.write("\n")


class LastLine:
    """Shows the last line that a command wrote: on a terminal, and nowhere else."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def read(self, line: str) -> None:
        if self._stream.isatty() and line.strip():
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{line.strip()[:width]}")
            self._stream.flush()

    def close(self) -> None:
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")


def _left(seconds: float) -> str:
    return ", less than a minute left" if seconds < 60 else f", about {round(seconds / 60)} min left"


def run(
    command: Sequence[str],
    read: Callable[[str], object],
    log: Path,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a command; what it says is handed to `read`, line by line, and written into `log`.

    Raises:
        InstallError: it failed.
    """
    with (
        open(log, "w", encoding="utf-8") as record,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            record.write(line)
            read(line)
    if process.returncode:
        raise InstallError(f"that failed; all it said is in {log}\n{explain(log.read_text('utf-8'))}")


def pinned() -> str:
    """Return the version of llama-cpp-python that the project wants."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(r'"llama-cpp-python>=([\d.]+)', text)
    assert found is not None
    return found[1]


def is_installed(release: str) -> bool:
    try:
        return version("llama-cpp-python") == release
    except PackageNotFoundError:
        return False


def build_folder(release: str) -> Path:
    """Return the folder in which one version of llama.cpp is compiled in one way."""
    ways = [os.environ.get(name, "") for name in ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS")]
    digest = hashlib.sha256("\0".join(ways).encode()).hexdigest()[:8]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "amulet" / f"llama-cpp-python-{release}-{digest}"


def check(folder: Path) -> None:
    """Say at once what would fail later.

    Raises:
        InstallError: there is no compiler, or no room.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
        raise InstallError(f"llama.cpp has to be compiled, and no compiler is there.\n{_COMPILER}")
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise InstallError(
            f"llama.cpp needs {ROOM / 1e6:.0f} MB in {folder}, and {free / 1e6:.0f} are free.\n"
            "make room, or choose another place with XDG_CACHE_HOME"
        )


def fetch(release: str, folder: Path) -> Path:
    """Return the unpacked source of llama-cpp-python, fetched if it is not there."""
    source = folder / "source"
    if not source.is_dir():
        say(f"fetching llama.cpp (llama-cpp-python {release}, 75 MB)")
        fetched = folder / "fetched"
        shutil.rmtree(fetched, ignore_errors=True)
        asked = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={release}"]
        command = [*PIP, "download", *asked, "-d", str(fetched)]
        run(command, lambda line: None, folder / "log")
        (packed,) = fetched.iterdir()
        with tarfile.open(packed) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # older ones have none
            archive.extractall(fetched)
        packed.unlink()
        (unpacked,) = fetched.iterdir()
        unpacked.rename(source)
    return source


def compiled(release: str) -> Path:
    """Return a wheel of llama-cpp-python: of an earlier time, or compiled now.

    Raises:
        InstallError: it cannot be compiled.
    """
    folder = build_folder(release)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another checkout's may be at it
        for wheel in folder.glob("*.whl"):
            return wheel
        check(folder)
        source, build, made = fetch(release, folder), folder / "build", folder / "made"
        again = ", going on where it was" if build.is_dir() else ", once"
        say(f"compiling llama.cpp for this machine{again}")
        only = f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={ROOT / 'scripts' / 'llama.cmake'}"
        environment = {
            **os.environ,
            "CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} {shlex.quote(only)}",
            "SKBUILD_BUILD_DIR": str(build),
        }
        progress = Progress("compiling llama.cpp")
        try:
            command = [*PIP, "wheel", "--verbose", "--no-deps", "-w", str(made), str(source)]
            run(command, progress.read, folder / "log", environment)
        finally:
            progress.close()
        (fresh,) = made.glob("*.whl")
        wheel = fresh.rename(folder / fresh.name)
        for scratch in (source, build, made, folder / "fetched"):
            shutil.rmtree(scratch, ignore_errors=True)
    return wheel


def install(extra: str) -> None:
    """Install the project with an extra, and what it needs.

    Raises:
        InstallError: it cannot be installed.
    """
    release = pinned()
    wheels = [] if is_installed(release) else [str(compiled(release))]
    say("installing the project and what it needs")
    uv = shutil.which("uv")
    pip = (
        [uv, "pip", "install", "--python", sys.executable]
        if uv
        else [*PIP, "install", "--progress-bar=off"]
    )
    log = Path(sys.prefix, "install.log")
    shown = LastLine()
    try:
        run([*pip, *wheels, "-e", f"{ROOT}[{extra}]"], shown.read, log)
    finally:
        shown.close()


def main() -> int:
    try:
        if sys.argv[1] == "--wheel":
            print(compiled(pinned()))
        else:
            install(sys.argv[1])
    except InstallError as error:
        for line in str(error).splitlines():
            say(line)
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
