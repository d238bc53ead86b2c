"""Usage: check.py FOLDER; scripts/freeze runs it. Freezes two programs there, and checks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from amulet_gguf.models import bundled_model
from amulet_gguf.system import child

ROOT = Path(__file__).parents[2]
SECONDS = 300  # at most, for anything


def freeze(folder: Path, name: str, script: Path, options: Sequence[str]) -> Path:
    """Freeze a script into a folder whose path has a space; return the program."""
    work = folder / "work"
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--clean", "--log-level", "ERROR"]
    places = ["--distpath", f"{folder}/two words", "--workpath", str(work), "--specpath", str(work)]
    subprocess.run([*command, *places, "--name", name, *options, str(script)], check=True)
    return folder / "two words" / name / name


def first_answer(program: Path, cwd: Path, environment: Mapping[str, str]) -> float:
    """Return the seconds from the start of the server to the end of an answer of one token."""
    began = time.monotonic()
    command = [str(program), "serve", "--port", "0", "--ready-json", "--exit-with-parent"]
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        while not is_ready(f"{url}/health"):
            assert time.monotonic() < began + SECONDS
            time.sleep(0.02)
        asked = {"messages": [{"role": "user", "content": "Hi"}], "prefer": "formal", "max_tokens": 1}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(asked).encode())
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            assert json.load(response)["choices"][0]["message"]["content"]
        seconds = time.monotonic() - began
        server.stdin.close()
        assert server.wait(SECONDS) == 0
        return seconds


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS):
            return True
    except urllib.error.HTTPError:  # 503: it is being loaded
        return False


def first_words(program: Path, cwd: Path, environment: Mapping[str, str]) -> float:
    """Return the seconds in which the window is shown, writes its first words, and is closed."""
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "words"
        environment = {**environment, "AMULET_WORDS": str(words), "QT_QPA_PLATFORM": "offscreen"}
        began = time.monotonic()
        subprocess.run(
            [program], cwd=cwd, env=environment, stderr=subprocess.DEVNULL, timeout=SECONDS, check=True
        )
        assert words.read_text("utf-8").strip()
        return time.monotonic() - began


def check_children(program: Path) -> None:
    """See that the program is also the processes in which templates are rendered and files tried."""

    def said(*arguments: object, request: bytes = b"") -> bytes:
        command = [str(program), child.CHILD, *map(str, arguments)]
        return subprocess.run(command, input=request, stdout=subprocess.PIPE, timeout=SECONDS).stdout

    names = {"now": "2026-01-01T00:00:00"}
    request = json.dumps({"source": "{{ 6 * 7 }}", "names": names}).encode()
    assert said("rendering", request=request).split()[0] == b"ready"
    assert b'{"text": "42"}' in said("rendering", request=request)
    assert said("trial", bundled_model(), "null").endswith(b"works\n")


def files(folder: Path) -> dict[Path, tuple[float, int]]:
    """Return all files in a folder, with the times of their last change and their sizes."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path: (path.stat().st_mtime, path.stat().st_size) for path in paths}


def check(program: Path, start: Callable[..., float]) -> None:
    """Start a program twice from different folders: it compiles once, and leaves itself as it was."""
    application = files(program.parent)
    with tempfile.TemporaryDirectory() as home:
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        environment |= dict.fromkeys(("HOME", "XDG_CACHE_HOME", "AMULET_HOME"), home)
        first = start(program, ROOT, environment)
        kept = {path: times for path, times in files(Path(home)).items() if ".nb" in path.suffix}
        assert kept
        second = start(program, Path(home), environment)
        assert kept.items() <= files(Path(home)).items(), "kernels were compiled again"
    check_children(program)
    assert files(program.parent) == application
    size = sum(size for _, size in application.values()) / 1e6
    print(f"{program.name}: {size:.0f} MB; answers in {first:.1f} s at first, then in {second:.1f} s")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    server = freeze(folder, "amulet", ROOT / "amulet_gguf" / "__main__.py", [])
    check(server, first_answer)
    demo = ["--windowed", "--paths", str(ROOT / "scripts"), "--hidden-import", "desktop_demo"]
    window = freeze(folder, "writing helper", Path(__file__).with_name("driven_demo.py"), demo)
    check(window, first_words)
