"""The chat templates, vocabularies and server tests in llama-cpp-python's source distribution.

They are other people's: fetched here, once for a machine, not copied into the project.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

_FOLDERS = {
    "models": "/vendor/llama.cpp/models/",
    "server_tests": "/vendor/llama.cpp/tools/server/tests/",
}


def peer_models() -> Path:
    """Return the folder `models` of llama.cpp's source tree, as the installed version has it."""
    return _peers() / "models"


def peer_server_tests() -> Path:
    """Return the folder of the tests of llama.cpp's server."""
    return _peers() / "server_tests"


def _peers() -> Path:
    name = f"llama_cpp_python-{version('llama-cpp-python')}"
    folder = user_cache_path("amulet-tests") / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not all((folder / target).is_dir() for target in _FOLDERS):
            _fetch(name, folder)
    return folder


def _fetch(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        asked = name.replace("llama_cpp_python-", "llama-cpp-python==")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run([*command, "llama-cpp-python", "-d", scratch, asked], check=True, timeout=600)
        with tarfile.open(Path(scratch, f"{name}.tar.gz")) as archive:
            for member in archive:
                for target, place in _FOLDERS.items():
                    if member.isfile() and place in f"/{member.name}":
                        path = Path(scratch, target, member.name.split(place)[1])
                        path.parent.mkdir(parents=True, exist_ok=True)
                        file = archive.extractfile(member)
                        assert file is not None
                        path.write_bytes(file.read())
        for target in _FOLDERS:
            if not (folder / target).is_dir():
                Path(scratch, target).rename(folder / target)


if __name__ == "__main__":
    print(peer_models())
