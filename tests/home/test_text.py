"""Files as Windows and its shells write them."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.home.text import as_utf8, decoded

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
