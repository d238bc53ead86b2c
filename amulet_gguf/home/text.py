"""Text as people's files have it, with a byte order mark, in UTF-16, with the line ends of Windows, and
as a terminal should have it."""

from __future__ import annotations

import codecs

_MARKS_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_DIRECTIONS = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_MAX_SHOWN = 60  # characters
_SURROGATES = range(0xD800, 0xE000)
_OBEYED = dict.fromkeys({*_CONTROLS, *_DIRECTIONS, *_SURROGATES} - {*map(ord, "\n\t")}, "\ufffd")


def as_utf8(data: bytes) -> bytes:
    """Return text as UTF-8 without a mark; UTF-16 has one, as PowerShell's ">" writes it.

    Raises:
        UnicodeError: it begins with UTF-16's mark and is none.
    """
    if data.startswith(_MARKS_16):
        return data.decode("utf-16").encode()
    return data.removeprefix(codecs.BOM_UTF8)


def decoded(data: bytes) -> str:
    """Return a text, its lines ended by newlines.

    Raises:
        UnicodeError: it is neither UTF-8 nor UTF-16 with a mark.
    """
    return as_utf8(data).decode().replace("\r\n", "\n")


def printable(text: str) -> str:
    """Return a text that a terminal shows and does not obey.

    Newlines and tabs stay. Other control characters, those that turn the direction of writing, and
    surrogates, which are no characters, are replaced.
    """
    return text.translate(_OBEYED)


def on_one_line(text: str) -> str:
    """Return a text that is one line, and `printable`."""
    return printable(" ".join(text.split()))


def shortened(text: str) -> str:
    """Return the beginning of a text `on_one_line`, with a mark where the rest is missing."""
    line = on_one_line(text)
    return line if len(line) <= _MAX_SHOWN else f"{line[: _MAX_SHOWN - 1]}…"
