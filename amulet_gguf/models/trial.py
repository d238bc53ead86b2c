"""A model file that is new here is tried in a process of its own before it is loaded.

llama.cpp answers some contradictions in a file by ending the process or by never coming back, and no
list of them is complete. What was tried is remembered by a digest of all that precedes the weights (no
number in them is known to end it) and by the version of llama.cpp, so that a file is tried once. Files
that `amulet models pull` verified, and the bundled one, need no trial.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from amulet_gguf.errors import AmuletError, ModelError, ModelFormatError
from amulet_gguf.home.paths import cache_folder
from amulet_gguf.home.text import on_one_line
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.gguf import parts, read_header, shown, size
from amulet_gguf.llama.memory import MIN_N_CTX
from amulet_gguf.llama.model import Model, can_offload
from amulet_gguf.system.child import can_start_children, frozen_command
from amulet_gguf.system.platforms import apart, end_after, fail_quietly, limit_memory, stack_bytes

logger = logging.getLogger(__name__)

#: Digests of files that need no trial: the bundled model's.
_TRUSTED: Final = frozenset({"1b266ebd5266a11da6f927a5909f40d01970837a0db8d1d54bd90d68a0e7c75a"})
_SECONDS: Final = 30.0  # for a small file; it takes one
_BYTES_PER_SECOND: Final = 15e6  # of a slow disk, from which a large file is read
_LOOK_SECONDS: Final = 0.2
_MEMORY: Final = 4 * 2**30  # beyond twice the file, which may be mapped and repacked
_MAX_STACK: Final = 2**26
_MAX_KEPT: Final = 16_384  # bytes of what the process writes
_MAX_SAID: Final = 160  # characters that are quoted of what llama.cpp said
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from amulet_gguf.models import trial; trial.main()"
)
#: What the process writes first, and when llama.cpp came back, whether it liked the file or not.
_BEGAN: Final = b"began\n"
_WORKS: Final = b"works\n"
_REFUSED: Final = b"refused\n"
# Bytes that a vocabulary may lack, characters of several bytes, digits and blanks in a row.
_TEXT: Final = (
    "".join(map(chr, range(1, 0x250))) + " Word   word\n\n1234567 汉字 кириллица عربي 🙂\ufffd"
)


def is_known(path: Path) -> bool:
    """Tell whether a model file needs no trial.

    Raises:
        ModelNotFoundError, ModelFormatError: it cannot be read.
    """
    digest = _digest(path)
    return digest in _TRUSTED or _mark(digest).exists()


def try_out(
    path: Path,
    n_gpu_layers: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Load a model file in another process, and decode some tokens; remember it if that works.

    A file that llama.cpp refuses in good order, or that cannot be tried, is left to whoever loads it.

    Args:
        n_gpu_layers: as `Model`.
        progress: called with 0 now and then; what it raises ends the trial.

    Raises:
        ModelFormatError: it ends the process that loads it, or comes to no end.
    """
    if not can_start_children():
        return
    seconds = _seconds(path)
    arguments = [str(path), json.dumps(n_gpu_layers)]
    places = json.dumps([place for place in sys.path if isinstance(place, str)])
    command = frozen_command("trial", *arguments)
    try:
        process = subprocess.Popen(
            command or [sys.executable, "-I", "-c", _START, *arguments, places],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **apart(),  # Ctrl-C at the terminal is for this one, which then ends the other
        )
    except OSError as error:
        logger.warning("no process can be started to try %s: %s", path, error.strerror)
        return
    said, is_late = _watched(process, seconds, progress)
    code = process.returncode
    if not is_late and _BEGAN not in said.first:
        logger.warning("%s was not tried: %s", path, _reason(said.last, code))
    elif code == 0 and said.last.endswith(_WORKS):
        trust(path)
    elif is_late:
        raise ModelFormatError(
            f"{shown(path)} did not give a token within {seconds:.0f} seconds: it is damaged, or this "
            "machine too slow for it; --trust-model loads it untried"
        )
    elif code != 0 or not said.last.endswith(_REFUSED):
        raise ModelFormatError(
            f"{shown(path)} ends llama.cpp ({_reason(said.last, code)}): it is damaged, or of a kind "
            "that this version does not know; download it again, or choose another"
        )


def trust(path: Path) -> None:
    """Remember a file as one that needs no trial, if it is a model."""
    # A home that cannot be written: it is tried again.
    with suppress(ModelError, OSError):
        mark = _mark(_digest(path))
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def main() -> None:
    """Load a model and use it as an answer does; the process may end on the way."""
    path, n_gpu_layers = sys.argv[1:3]
    _set_limits(Path(path))
    os.write(1, _BEGAN)  # by its number: a program without a console has no sys.stdout
    try:
        with Model(path, n_gpu_layers=json.loads(n_gpu_layers)) as model:
            _use(model)
        verdict = _WORKS
    except (AmuletError, OSError, MemoryError):
        verdict = _REFUSED
    os.write(1, b"\n" + verdict)
    os._exit(0)  # what a driver does at an orderly end is not the file's fault


def _use(model: Model) -> None:
    model.special_texts()
    for token in range(model.n_vocab):
        model.token_bytes(token)
    tokens = model.tokenize(_TEXT)[:16]
    with Context(model, n_ctx=MIN_N_CTX, n_sequences=2) as context:
        for n_rows in (len(tokens), 1):
            for sequence in (0, 1):
                context.add(sequence, tokens[:n_rows], output=True)
            context.decode()


def _seconds(path: Path) -> float:
    """Return how long a trial may take."""
    return _SECONDS + size(path) / _BYTES_PER_SECOND


def _set_limits(path: Path) -> None:
    fail_quietly()
    end_after(int(_seconds(path)) + 10)  # its parent may be gone by then
    stack = stack_bytes()
    # A GPU's driver reserves addresses by the terabyte; of threads with large stacks none may lack.
    if stack is not None and stack <= _MAX_STACK and not can_offload():
        most = psutil.Process().memory_info().vms + 2 * size(path) + _MEMORY
        limit_memory(most + 2 * _MAX_STACK * (os.cpu_count() or 1))  # stacks and heaps of threads


class _Said:
    """The beginning and the end of what a process writes; it may write any amount."""

    def __init__(self) -> None:
        self.first = self.last = b""

    def listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while block := os.read(process.stdout.fileno(), 65_536):
            self.first = self.first or block
            self.last = (self.last + block)[-_MAX_KEPT:]


def _watched(
    process: subprocess.Popen[bytes], seconds: float, progress: Callable[[float], None] | None
) -> tuple[_Said, bool]:
    """Wait for a process, and kill it when its time is over or `progress` raises; tell what it said,
    and whether it was late."""
    said = _Said()
    reader = threading.Thread(target=said.listen, args=(process,), daemon=True)
    reader.start()
    end = time.monotonic() + seconds
    try:
        while reader.is_alive() and time.monotonic() < end:
            reader.join(_LOOK_SECONDS)
            if progress is not None:
                progress(0.0)
        is_late = reader.is_alive()
        if not is_late:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS)
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()
    return said, is_late


def _reason(said: bytes, code: int) -> str:
    """Return what llama.cpp said last, in a line that can be printed, or else the signal."""
    text = said.removeprefix(_BEGAN).decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return signal.Signals(-code).name if code < 0 else f"exit code {code:#x}"
    return on_one_line(lines[-1].rsplit("/", 1)[-1])[:_MAX_SAID]


def _digest(path: Path) -> str:
    """Return what tells a model from others: all of its files that precedes weights, and their sizes."""
    digest = hashlib.sha256()
    for part in parts(path) or [path]:
        n_bytes = read_header(part).n_bytes
        with part.open("rb") as file:
            digest.update(f"{n_bytes} {os.fstat(file.fileno()).st_size} ".encode())
            digest.update(file.read(n_bytes))
    return digest.hexdigest()


def _mark(digest: str) -> Path:
    """Return the file that is there if a model was tried with this version of llama.cpp."""
    import llama_cpp

    return cache_folder() / "tried" / f"{llama_cpp.__version__}-{digest}"


if __name__ == "__main__":
    main()
