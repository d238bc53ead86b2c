"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, line ends as they are: afterwards the file holds all of it or what it held.

    An existing file keeps its permissions and a link keeps pointing to its target. A device or pipe,
    which cannot be replaced, is written like any file.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
        UnicodeEncodeError: the text holds half of a surrogate pair; nothing is touched.
    """
    data = text.encode()
    target = Path(os.path.realpath(path))  # replacing a link itself would cut it off
    mode = None
    with suppress(FileNotFoundError):
        status = target.stat()
        if not stat.S_ISREG(status.st_mode):
            target.write_bytes(data)
            return
        with open(target, "ab"):  # replacing needs no right to write the file, but disrespects it
            mode = stat.S_IMODE(status.st_mode)

    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    # What replaces a private file must not be readable for a moment; a new file follows the umask.
    create = 0o666 if mode is None else 0o600
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, create)) as file:
            file.write(data)
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
