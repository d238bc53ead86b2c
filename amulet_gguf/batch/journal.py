"""The output of a batch: results are appended as they come, and survive whatever ends the process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final

from filelock import FileLock, Timeout

from amulet_gguf.errors import BatchError
from amulet_gguf.home.files import replacing
from amulet_gguf.llama.files import open_file

_MAX_LINE: Final = 2**28  # bytes; a result is shorter
_BEGIN: Final = b'{"line": '


class Journal:
    """A file of one JSON object per line, each the result of one record.

    A result is on disk before `append` returns. A line that was being written when the power went is
    cut off when the file is opened again; the record it belongs to counts as not done.

    Attributes:
        done: lines of the input whose results the file holds.
    """

    def __init__(self, path: Path, keys: Mapping[int, str]) -> None:
        """Open the file, or make it.

        Args:
            path: of the file.
            keys: by line of the input, what identifies a record; results of others are refused.

        Raises:
            BatchError: the file holds something else, another process writes it, or it cannot be
                opened. It is left as it was.
        """
        self.path = path
        self._keys = keys
        self._offsets: dict[int, int] = {}
        self._target = Path(os.path.realpath(path))  # whatever name it is called by, the lock is one
        self._lock = FileLock(self._target.with_name(self._target.name + ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BatchError(f"another process is writing {path}: wait for it, or stop it") from None
        except OSError as error:
            raise self._failure(error) from None
        try:
            self._file = self._open()
            try:
                self._end = self._read()
                if self._end < os.path.getsize(self._target):
                    self._file.truncate(self._end)
            except BaseException as error:
                self._file.close()
                if isinstance(error, OSError):
                    raise self._failure(error) from None
                raise
        except BaseException:
            self._unlock()
            raise

    @property
    def done(self) -> frozenset[int]:
        return frozenset(self._offsets)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._unlock()

    def append(self, line: int, result: Mapping[str, Any]) -> None:
        """Write the result of a record.

        Raises:
            BatchError: it could not be written; the file holds what it held before.
        """
        record = {"line": line, **result, "key": self._keys[line]}
        # A lone surrogate, which UTF-8 cannot hold, becomes the escape that JSON knows for it.
        text = json.dumps(record, ensure_ascii=False) + "\n"
        data = text.encode("utf-8", "backslashreplace")
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            if isinstance(error, OSError):
                raise BatchError(
                    f"{self.path} cannot be written ({error.strerror or error}); what is done is kept: "
                    "run the same command to go on"
                ) from None
            raise
        self._offsets[line] = self._end
        self._end += len(data)

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield what the file holds, in the order of the input."""
        with open(self._target, "rb") as file:
            for line in sorted(self._offsets):
                file.seek(self._offsets[line])
                yield json.loads(file.readline())

    def sort(self) -> None:
        """Put the results into the order of the input, in one step: the file is never incomplete.

        Raises:
            BatchError: it could not be written; the file is as it was.
        """
        lines = sorted(self._offsets)
        if all(self._offsets[a] < self._offsets[b] for a, b in pairwise(lines)):
            return
        offsets: dict[int, int] = {}
        try:
            with open(self._target, "rb") as source, replacing(self._target) as file:
                for line in lines:
                    source.seek(self._offsets[line])
                    offsets[line] = file.tell()
                    file.write(source.readline())
        except OSError as error:
            raise BatchError(
                f"{self.path} is complete and could not be sorted: {error.strerror or error}"
            ) from None
        self._offsets = offsets
        self._file.close()
        self._file = self._open()

    def _open(self) -> BinaryIO:
        try:
            if self._target.exists() and not self._target.is_file():
                raise BatchError(f"{self.path} is not a file that results can be kept in")
            return open(self._target, "a+b", buffering=0)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> BatchError:
        return BatchError(f"{self.path} cannot be written: {error.strerror or error}")

    def _unlock(self) -> None:
        # Removed while it is held: whoever comes next makes a new one.
        with contextlib.suppress(OSError):
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def _read(self) -> int:
        """Find the results in the file; return where a torn line at its end begins."""
        self._file.seek(0)
        offset = 0
        with open_file(self._target) as file:
            for number, text in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
                line = self._line_of(text)
                if line is None:
                    if not file.peek(1) and self._is_torn(text):
                        return offset
                    raise BatchError(
                        f"{self.path}, line {number}, is not a result of this input with these "
                        "settings and this model: choose another output, or remove the file"
                    )
                if line in self._offsets:
                    raise BatchError(f"{self.path} holds the result of record {line} twice")
                self._offsets[line] = offset
                offset += len(text)
        return offset

    def _line_of(self, text: bytes) -> int | None:
        """Return the record that a whole line of the file is the result of, or None."""
        if not text.endswith(b"\n"):
            return None
        try:
            result = json.loads(text)
            line = result["line"]
            return line if self._keys[line] == result["key"] else None
        except (ValueError, LookupError, TypeError, RecursionError):
            return None

    def _is_torn(self, text: bytes) -> bool:
        """Tell whether a last line can be the beginning of a result, or zeros left by a power cut."""
        begin = text.rstrip(b"\0")
        if begin.endswith(b"\n"):
            return False
        if begin.endswith(b"}"):  # all but the end of the line, or something else
            return self._line_of(begin + b"\n") is not None or not _is_json(begin)
        return begin.startswith(_BEGIN) or _BEGIN.startswith(begin)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
