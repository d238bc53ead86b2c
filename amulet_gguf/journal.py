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
        lock = path.with_name(path.name + ".lock")
        self._lock = FileLock(lock)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BatchError(f"another process is writing {path}: wait for it, or stop it") from None
        except OSError as error:
            raise BatchError(f"{path} cannot be written: {error.strerror or error}") from None
        try:
            try:
                self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise BatchError(f"{path} cannot be written: {error.strerror or error}") from None
            try:
                self._end = self._read()
                self._file.truncate(self._end)
            except BaseException:
                self._file.close()
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
        with open(self.path, "rb") as file:
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
        target = self.path.resolve()
        temporary = target.with_name(target.name + ".sorted")
        offsets: dict[int, int] = {}
        try:
            with open(target, "rb") as source, open(temporary, "wb") as file:
                for line in lines:
                    source.seek(self._offsets[line])
                    offsets[line] = file.tell()
                    file.write(source.readline())
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            try:
                os.replace(temporary, target)
                self._offsets = offsets
            finally:
                self._file = open(target, "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise BatchError(
                f"{self.path} is complete and could not be sorted: {error.strerror or error}"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _unlock(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _read(self) -> int:
        """Find the results in the file; return where a torn line at its end begins."""
        self._file.seek(0)
        offset = 0
        with open(self.path, "rb") as file:
            for number, text in enumerate(file, 1):
                line = self._line_of(text)
                if line is None:
                    if not file.peek(1) and _is_torn(text):
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


def _is_torn(text: bytes) -> bool:
    """Tell whether a last line can be the beginning of a result, or zeros that a power cut leaves."""
    begin = text.rstrip(b"\0")
    whole = begin.endswith(b"\n") and not text.endswith(b"\0")
    return not whole and (begin.startswith(_BEGIN) or _BEGIN.startswith(begin))
