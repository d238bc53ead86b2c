"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write into, which takes the place of `path` if the block ends well.

    Until then, and if it fails, `path` holds what it held. An existing file keeps its permissions and a
    link keeps pointing to its target.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    target = Path(os.path.realpath(path))  # replacing a link itself would cut it off
    mode = None
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(target.stat().st_mode)
        with open(target, "ab"):  # replacing needs no right to write the file, but disrespects it
            pass
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    # What replaces a private file must not be readable for a moment; a new file follows the umask.
    create = 0o666 if mode is None else 0o600
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, create)) as file:
            yield file
            file.flush()
            if mode is not None:
                os.chmod(temporary, mode)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads that lock the same file from it meanwhile; make its folder.

    Raises:
        OSError: it cannot be locked, or not within ten seconds.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(path.with_suffix(".lock"), timeout=10):
        yield


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, line ends as they are: afterwards the file holds all of it or what it held.

    A device or pipe, which cannot be replaced, is written like any file.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
        UnicodeEncodeError: the text holds half of a surrogate pair; nothing is touched.
    """
    data = text.encode()
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with replacing(path) as file:
        file.write(data)


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut, where the system can do that."""
    if os.name != "posix":
        return
    # The file is in place by now: a network drive without this must not make it look like a failure.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
