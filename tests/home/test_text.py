"""Files as Windows and its shells write them."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.home.text import as_utf8, decoded, on_one_line, printable

MARKED = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff")))
def test_every_encoding_says_the_same(text: str) -> None:
    for encoding, mark in MARKED.items():
        assert decoded(mark + text.encode(encoding)) == text
        assert decoded(mark + text.replace("\n", "\r\n").encode(encoding)) == text
        assert as_utf8(mark + text.encode(encoding)) == text.encode()
    assert decoded(text.encode()) == text


@pytest.mark.parametrize("data", [b"\xff", b"caf\xe9", codecs.BOM_UTF16_LE + b"a", b"\x80abc"])
def test_other_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(UnicodeError):
        decoded(data)


OBEYED = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]
OBEYED += [*range(0x2066, 0x206A), 0xD800, 0xDBFF, 0xDC80, 0xDFFF]


def test_what_a_terminal_obeys_is_replaced_and_nothing_else() -> None:
    for code in range(0x3000):
        kept = chr(code) if code not in OBEYED or chr(code) in "\n\t" else "�"
        assert printable(f"a{chr(code)}b") == f"a{kept}b"
    for code in OBEYED[-4:]:
        assert printable(chr(code)) == "�"
    assert on_one_line("a\n b\x1b]0;t\x07\r\n") == "a b�]0;t�"
