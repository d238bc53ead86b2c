"""Reading no more of a file than was promised, and writing so that nothing leaves half of one: no crash,
full disk or Ctrl-C."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from amulet_gguf.llama.files import open_file
from amulet_gguf.system.platforms import open_without_waiting, sync_folder

_BLOCK: Final = 2**20


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return what a file holds, or a pipe that a shell passed.

    Raises:
        OSError: it cannot be read, is neither, or holds more than `limit` bytes.
    """
    with open_file(path, pipes=True) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_large(limit)
        return read_stream(file, limit)  # what a size says is no promise


def read_stream(stream: BinaryIO, limit: int) -> bytes:
    """Return what a stream gives until it ends.

    Raises:
        OSError: it cannot be read, or gives more than `limit` bytes.
    """
    data = io.BytesIO()
    while block := stream.read(min(limit + 1 - data.tell(), _BLOCK)):
        data.write(block)
        if data.tell() > limit:
            raise _too_large(limit)
    return data.getvalue()


def _too_large(limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {limit / 2**20:,.0f} MB")


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
        found = target.stat().st_mode
        if not stat.S_ISREG(found):  # whoever may do anything would replace the device itself
            raise OSError(errno.EINVAL, "it is not a file", os.fspath(path))
        mode = stat.S_IMODE(found)
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
    sync_folder(target.parent)


def make_folder(path: Path) -> None:
    """Make a folder for the user alone, and those that it is in, if it is not there.

    Raises:
        OSError: it cannot be made, or something else has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is not a folder") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads that lock the same file from it meanwhile; make its folder.

    Raises:
        OSError: it cannot be locked, or not within ten seconds.
    """
    from filelock import FileLock

    make_folder(path.parent)
    with FileLock(path.with_suffix(".lock"), timeout=10):
        yield


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, line ends as they are: afterwards the file holds all of it or what it held.

    A device or pipe, which cannot be replaced, is written like any file; a pipe that nobody reads is an
    error.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
        UnicodeEncodeError: the text holds half of a surrogate pair; nothing is touched.
    """
    data = text.encode()
    if path.exists() and not path.is_file():
        with open(path, "wb", opener=open_without_waiting) as file:
            file.write(data)
        return
    with replacing(path) as file:
        file.write(data)
