"""The chat templates and vocabularies that come inside llama-cpp-python's source distribution.

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

_FOLDER = "/vendor/llama.cpp/models/"


def peer_models() -> Path:
    """Return the folder `models` of llama.cpp's source tree, as the installed version has it."""
    name = f"llama_cpp_python-{version('llama-cpp-python')}"
    folder = user_cache_path("amulet-tests") / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "models").is_dir():
            _fetch(name, folder)
    return folder / "models"


def _fetch(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        asked = name.replace("llama_cpp_python-", "llama-cpp-python==")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run([*command, "llama-cpp-python", "-d", scratch, asked], check=True, timeout=600)
        target = Path(scratch, "models")
        with tarfile.open(Path(scratch, f"{name}.tar.gz")) as archive:
            for member in archive:
                if member.isfile() and _FOLDER in f"/{member.name}":
                    path = target / member.name.split(_FOLDER)[1]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file = archive.extractfile(member)
                    assert file is not None
                    path.write_bytes(file.read())
        target.rename(folder / "models")


if __name__ == "__main__":
    print(peer_models())
