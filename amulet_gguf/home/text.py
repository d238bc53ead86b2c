"""Text as people's files have it: with a byte order mark, in UTF-16, with the line ends of Windows."""

from __future__ import annotations

import codecs

_MARKS_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
