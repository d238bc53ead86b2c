"""The standard streams: what reaches a terminal, and what becomes of streams that are closed or full."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from typing import Any, BinaryIO, Final, Literal, NoReturn, TextIO, cast

import click

from amulet_gguf.errors import SettingError
from amulet_gguf.home.files import read_stream
from amulet_gguf.home.text import decoded, on_one_line, printable

_MAX_LINE: Final = 16 * 2**20  # bytes
_STDOUT: Final = "stdout"
_STDERR: Final = "stderr"
_AS_IT_CAME: Final = "amulet"  # name of a way to encode


class _Stream(io.TextIOBase):
    """A standard stream whose errors name it, and whose text a terminal shows and does not obey."""

    def __init__(self, stream: TextIO, name: str, *, cleans: bool) -> None:
        self._stream = stream
        self._name = name
        self._cleans = cleans

    @property
    def unclean(self) -> TextIO:
        """The same, for what is styled."""
        return cast(TextIO, _Stream(self._stream, self._name, cleans=False))

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def buffer(self) -> BinaryIO:
        """For bytes, as click writes them to a shell that completes; no terminal gets any."""
        if self._cleans:
            raise AttributeError("buffer")
        return self._stream.buffer

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str, /) -> int:
        try:
            self._stream.write(printable(text) if self._cleans else text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._name != _STDERR:  # of which nobody can be told
            raise OSError(error.errno, error.strerror, self._name) from None

    def close(self) -> None:
        """Leave the stream open: it is not this one's."""


def prepare_streams() -> None:
    """Make the standard streams safe to use, whatever they are and whatever is written.

    To a terminal, and to stderr always, text goes without control characters; who styles it writes to
    `unclean`. Results in a pipe or file are as they are. What was closed cannot be read or written, but
    no other file gets its number.
    """
    sys.stdin = sys.stdin or _closed(0, "r")
    sys.stdout = sys.stdout or _closed(1, "w")
    sys.stderr = sys.stderr or _closed(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_AS_IT_CAME)
    if not isinstance(sys.stdout, _Stream):
        sys.stdout = _Stream(sys.stdout, _STDOUT, cleans=sys.stdout.isatty())
    if not isinstance(sys.stderr, _Stream):
        sys.stderr = _Stream(sys.stderr, _STDERR, cleans=True)


def _closed(number: int, mode: Literal["r", "w"]) -> TextIO:
    """Return a stream on which the other direction alone is open."""
    device = os.open(os.devnull, os.O_WRONLY if mode == "r" else os.O_RDONLY)
    os.set_inheritable(device, True)  # its number is the stream's: the lowest one that is free
    return open(number, mode, closefd=False)


def unclean(stream: TextIO) -> TextIO:
    """Return what styles are written to, of a standard stream."""
    return cast(TextIO, getattr(stream, "unclean", stream))


def fail(error: OSError) -> NoReturn:
    """End with one line about what cannot be read or written, where nobody knew more of it."""
    if error.filename == _STDOUT:
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # Python writes what is left when it ends
    place = error.filename
    if place is None:
        try:
            os.getcwd()
        except OSError:
            place = "the working folder"
    reason = error.strerror or str(error)
    echo(on_one_line(f"Error: {reason}" if place is None else f"Error: {place}: {reason}"), err=True)
    raise SystemExit(1)


def echo(text: object = "", *, err: bool = False, nl: bool = True, **style: Any) -> None:
    """Write a text to stdout or stderr, on a terminal in a style (of `click.style`)."""
    stream = sys.stderr if err else sys.stdout
    if style and stream.isatty():
        click.echo(click.style(printable(str(text)), **style), unclean(stream), nl)
    else:
        stream.write(f"{text}\n" if nl else str(text))
        stream.flush()


def echo_json(value: Any, indent: int | None = None) -> None:
    """Write a value as JSON; what of a name is no text becomes the escape that JSON has for it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    echo(text.encode("utf-8", "backslashreplace").decode())


def read_stdin(limit: int) -> bytes:
    """Return what stdin gives until it ends; raises ClickException if that is too much, or nothing."""
    try:
        return read_stream(sys.stdin.buffer, limit)
    except OSError as error:
        raise click.ClickException(f"stdin cannot be read: {error.strerror}") from None


def read_line() -> str | None:
    """Return a line of stdin, or None at its end.

    Raises:
        SettingError: it is no text; the next line may be.
        ClickException: it has no end, or stdin cannot be read.
    """
    try:
        line = sys.stdin.buffer.readline(_MAX_LINE)
    except OSError as error:
        raise click.ClickException(f"stdin cannot be read: {error.strerror}") from None
    if len(line) == _MAX_LINE:
        raise click.ClickException(f"stdin has a line of more than {_MAX_LINE >> 20} MB")
    try:
        return decoded(line).removesuffix("\n") if line else None
    except UnicodeError:
        raise SettingError("a line of stdin is not text in UTF-8") from None


class Output:
    """Writes an answer to stdout as it comes."""

    def __init__(self, *, err: bool = False) -> None:
        self._err = err
        self._line_is_open = False

    def write(self, text: str, **style: Any) -> None:
        if text:
            self._line_is_open = not text.endswith("\n")  # first: an interrupt may follow the write
            echo(text, err=self._err, nl=False, **style)

    def write_dim(self, text: str) -> None:
        """Write what is beside the answer; dim on a terminal that can."""
        self.write(text, **({} if "NO_COLOR" in os.environ else {"dim": True}))

    def end_line(self) -> None:
        if self._line_is_open:
            self.write("\n")


def _as_it_came(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode a character that an encoding lacks: a byte of a name as itself, all else as "?"."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        byte = error.object[error.start].encode(error.encoding, "surrogateescape")
    except UnicodeEncodeError:
        return "?", error.start + 1
    return byte, error.start + 1


codecs.register_error(_AS_IT_CAME, _as_it_came)
