"""What the installation shows while llama.cpp is compiled, and where it fails."""

from __future__ import annotations

import importlib.util
import io
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("scripts/bootstrap is for a POSIX shell", allow_module_level=True)

SCRIPT = Path(__file__).parent.parent / "scripts" / "install.py"
NINJA = [
    "  -- Build files have been written to: /build",
    *(f"  [{step}/20] Building CXX object llama.dir/f{step}.cpp.o" for step in range(1, 21)),
    "  Created wheel for llama_cpp_python",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def install() -> Any:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shown(install: Any, stream: io.StringIO) -> str:
    seconds = iter(range(0, 10_000, 30))
    progress = install.Progress("compiling", stream, lambda: next(seconds))
    for line in NINJA:
        progress.read(line)
    progress.close()
    return stream.getvalue()


def test_progress_is_one_line_on_a_terminal(install: Any) -> None:
    text = shown(install, Terminal())
    assert text.count("\n") == 1
    assert text.endswith("compiling: 20 of 20 steps, less than a minute left\n")
    assert "compiling: 10 of 20 steps, about 5 min left" in text
    assert "1 of 20 steps\r" in text  # nothing is known yet


def test_progress_is_a_line_for_each_tenth_elsewhere(install: Any) -> None:
    lines = shown(install, io.StringIO()).splitlines()
    assert len(lines) == 11
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_what_ninja_looks_for_and_builds_in_between_is_no_progress(install: Any) -> None:
    stream = io.StringIO()
    progress = install.Progress("compiling", stream)
    for line in ("[0/2] Re-checking globbed directories...", "[1/20] cc", "[2/2] cc", "[20/20] cc"):
        progress.read(line)
    assert [line.split(": ")[2] for line in stream.getvalue().splitlines()] == [
        "1 of 20 steps",
        "20 of 20 steps, less than a minute left",
    ]


def test_of_what_pip_says_the_last_line_is_shown_on_a_terminal_alone(install: Any) -> None:
    for stream, expected in ((Terminal(), 3), (io.StringIO(), 0)):
        last = install.LastLine(stream)
        for line in ("Collecting numpy\n", "\n", f"Downloading {'x' * 999}\n"):
            last.read(line)
        last.close()
        shown = stream.getvalue()
        assert shown.count("\r\x1b[K") == expected
        assert "\n" not in shown
        assert len(shown) < 300
        assert shown.endswith("\r\x1b[K" if expected else "")


@pytest.mark.parametrize(
    ("log", "matters", "cure"),
    [
        (
            "-- configuring\nCMake Error at CMakeLists.txt:3 (project):\n"
            "  No CMAKE_CXX_COMPILER could be found.\n-- Configuring incomplete",
            "No CMAKE_CXX_COMPILER could be found.",
            "apt install build-essential",
        ),
        (
            "[3/9] cc x.c\nFAILED: x.o\nfatal error: error writing to x.o: No space left on device",
            "FAILED: x.o",
            "make room",
        ),
        ("c++: fatal error: Killed signal terminated program cc1plus", "Killed", "PARALLEL_LEVEL=1"),
        ("ERROR: No matching distribution found for llama-cpp-python", "No matching", "HTTPS_PROXY"),
        (
            "CMake Error: CMake 3.21 or higher is required.  You are running 3.18",
            "3.18",
            "apt install cmake",
        ),
        ("a.cpp:3:1: error: expected ';'\nninja: build stopped", "expected ';'", ""),
        ("\n".join(f"line {n}" for n in range(100)), "line 99", ""),
    ],
)
def test_a_failure_shows_what_matters_and_the_cure(
    install: Any, log: str, matters: str, cure: str
) -> None:
    text = install.explain(log)
    assert matters in text
    assert cure in text
    assert "configuring" not in text
    assert len(text.splitlines()) <= 10


def test_no_compiler_is_said_before_anything_is_fetched(
    install: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(install.InstallError, match="build-essential"):
        install.compiled("0.0.0")


def test_no_room_is_said_before_anything_is_fetched(
    install: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(install, "ROOM", 10**18)
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(install.InstallError, match="XDG_CACHE_HOME"):
        install.compiled("0.0.0")


def stand_in(path: Path, script: str) -> list[str]:
    """Return a command that takes pip's place."""
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return [str(path)]


def test_what_was_interrupted_goes_on_in_the_same_folder_and_a_wheel_is_kept(
    install: Any, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    folder = install.build_folder("1.0")
    source = folder / "source"
    source.mkdir(parents=True)
    # The first time it is killed after one file, the second time it finds that and makes the wheel.
    pip = stand_in(
        tmp_path / "pip",
        f"""
        test -d {source} || exit 9
        case "$CMAKE_ARGS" in "-DGGML_CUDA=on "*llama.cmake) ;; *) exit 8 ;; esac
        if [ -e "$SKBUILD_BUILD_DIR/one.o" ]; then
            mkdir -p {folder}/made && touch {folder}/made/llama_cpp_python-1.0-py3-none-any.whl
        else
            mkdir -p "$SKBUILD_BUILD_DIR" && touch "$SKBUILD_BUILD_DIR/one.o"
            echo 'c++: fatal error: Killed signal'
            exit 1
        fi
        """,
    )
    monkeypatch.setattr(install, "PIP", pip)
    with pytest.raises(install.InstallError, match="PARALLEL_LEVEL=1"):
        install.compiled("1.0")
    wheel = install.compiled("1.0")
    assert wheel.exists()
    assert not source.exists()
    monkeypatch.setattr(install, "PIP", ["/nowhere"])
    assert install.compiled("1.0") == wheel
    monkeypatch.setenv("CMAKE_ARGS", "")
    assert install.build_folder("1.0") != folder  # another way to compile is another wheel


def test_the_version_that_is_compiled_is_the_one_that_is_installed_here(install: Any) -> None:
    assert install.is_installed(install.pinned())
    assert os.access(SCRIPT.with_name("bootstrap"), os.X_OK)
