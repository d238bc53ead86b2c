"""What differs between Linux, macOS and Windows. The other modules ask here, and none for the system.

The program that renders chat templates starts with this: only what is light is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

LINUX: bool = sys.platform == "linux"
WINDOWS: bool = sys.platform == "win32"
#: Signals that ask a process to end: by `kill`, by the end of its terminal, by Ctrl-Break on Windows.
ENDING: Final = ("SIGTERM", "SIGHUP", "SIGBREAK")
_LOOK_SECONDS: Final = 0.3  # between two looks for the parent
_NO_ERROR_BOXES: Final = 0x8003  # of SetErrorMode: for faults, critical errors, files that are missing


def usable_cores() -> set[int] | None:
    """Return the cores that the system lets this process use, None where it does not tell."""
    return os.sched_getaffinity(0) if LINUX else None


# Files


def open_without_waiting(name: str, flags: int) -> int:
    """Open, as `open`'s `opener`, without waiting for somebody at the other end of a pipe."""
    if WINDOWS:  # pipes have no names among files
        return os.open(name, flags)
    descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)
    os.set_blocking(descriptor, True)
    return descriptor


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut, where that can be done."""
    if WINDOWS:  # which opens no folders
        return
    # The file is in place by now: a network drive without this must not make it look like a failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_lock(path: Path) -> None:
    """Remove the file of a `filelock.FileLock` that this process holds."""
    if not WINDOWS:  # where a file that is open stays, and the lock itself removes it at its end
        path.unlink(missing_ok=True)


def searches_dependencies() -> bool:
    """Tell whether functions of the libraries that a library depends on are found through it."""
    return not WINDOWS


# Processes


def apart() -> dict[str, Any]:
    """Return what `subprocess.Popen` needs for a process without a window that Ctrl-C does not reach."""
    if WINDOWS:
        import subprocess

        return {"creationflags": subprocess.CREATE_NO_WINDOW}  # type: ignore[attr-defined,unused-ignore]
    return {"start_new_session": True}


def after_fork(forget: Callable[[], None]) -> None:
    """Have a function called in each process that is forked from this one; Windows has no such."""
    if not WINDOWS:
        os.register_at_fork(after_in_child=forget)


def fail_quietly() -> None:
    """See to it that the end of this process shows no window and leaves no dump of its memory."""
    if WINDOWS:
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(_NO_ERROR_BOXES)  # type: ignore[attr-defined,unused-ignore]
    else:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def end_after(seconds: int) -> None:
    """End this process that much later, whatever it does, where it can be; 0: do not."""
    if not WINDOWS:
        signal.alarm(seconds)


def limit_memory(n_bytes: int) -> None:
    """Let this process have that many bytes of addresses and no more, where that can be bounded.

    macOS knows the limit and refuses it; Windows has none that a process sets for itself.
    """
    if LINUX:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(ValueError, OSError):  # less is set already
            resource.setrlimit(resource.RLIMIT_AS, (n_bytes, most))


def stack_bytes() -> int | None:
    """Return the bytes of addresses that each thread takes for its stack, None where nobody tells."""
    if WINDOWS:
        return None
    import resource

    n_bytes, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return 2**21 if n_bytes == resource.RLIM_INFINITY else n_bytes  # glibc's, where there is no limit


def heeded(*names: str) -> list[int]:
    """Return the numbers of signals: those that the system has and that are not ignored, as by nohup."""
    numbers = (getattr(signal, name, None) for name in names)
    return [n for n in numbers if n is not None and signal.getsignal(n) is not signal.SIG_IGN]


def wait_for_parent() -> Callable[[], None]:
    """Return what waits for the end of the process that is the parent now."""
    if WINDOWS:
        import psutil

        process = psutil.Process().parent()  # None: gone, whosever its number is by now

        def is_there() -> bool:
            return process is not None and process.is_running()
    else:  # an orphan gets another one
        parent = os.getppid()

        def is_there() -> bool:
            return os.getppid() == parent

    def wait() -> None:
        while is_there():
            time.sleep(_LOOK_SECONDS)

    return wait


# Streams


def has_unread(descriptor: int) -> bool:
    """Tell whether something in a pipe waits to be read; no, where that cannot be told."""
    if WINDOWS or not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return False
    import fcntl
    import termios

    n_bytes = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    return any(n_bytes)


def wait_for_end(descriptor: int) -> None:
    """Read a pipe until it has an end."""
    with contextlib.suppress(OSError):
        if not WINDOWS:
            os.set_blocking(descriptor, True)  # some parents' pipes do not wait
        while os.read(descriptor, 4096):
            pass


@contextlib.contextmanager
def key_by_key(terminal: TextIO) -> Iterator[None]:
    """Let a terminal keep each key for who reads next.

    While nobody does, in its mode for whole lines, it takes a Ctrl-D for itself, and it is lost.
    """
    if WINDOWS:  # a console has no such mode
        yield
        return
    import termios

    before = termios.tcgetattr(terminal)
    mode = termios.tcgetattr(terminal)
    mode[3] &= ~termios.ICANON
    termios.tcsetattr(terminal, termios.TCSANOW, mode)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
