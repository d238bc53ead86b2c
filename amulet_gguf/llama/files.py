"""Opening what a user names: a file, and nothing that waits, never ends, or acts when it is opened."""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import Final

from amulet_gguf.system.platforms import open_without_waiting

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
#: By what a shell passes a pipe, as in `-f <(command)`; a process holds its other end.
_PASSED: Final = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")


def open_file(path: str | os.PathLike[str], *, pipes: bool = False) -> io.BufferedReader:
    """Open a file for reading.

    Args:
        pipes: take a pipe that a shell passed, too.

    Raises:
        OSError: it cannot be opened, or is no regular file: a folder, pipe, socket or device.
    """
    pipes = pipes and os.fspath(path).startswith(_PASSED)

    def check(mode: int) -> None:
        if not stat.S_ISREG(mode) and not (pipes and stat.S_ISFIFO(mode)):
            kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a device")
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))

    def opener(name: str, flags: int) -> int:
        check(os.stat(name).st_mode)  # before: a device may act when it is opened
        descriptor = open_without_waiting(name, flags)
        try:
            check(os.fstat(descriptor).st_mode)  # another may stand there by now
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    try:
        return open(path, "rb", opener=opener)
    except ValueError:  # a zero byte, or half of a surrogate pair
        raise OSError(errno.EINVAL, "it is no path") from None
