from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amulet_gguf.engine.text import TextAssembler

# Few letters, so that stop strings occur and overlap; characters of one to four bytes.
texts = st.text(st.sampled_from("aab é€😀"), max_size=30)
stops = st.lists(st.text(st.sampled_from("aab é€😀\ufffd"), min_size=1, max_size=5), max_size=3)
raw = st.one_of(
    st.binary(max_size=30),
    texts.map(str.encode),
    st.lists(st.sampled_from([b"a", b"b", b"\xf0\x9f", b"\x98\x80", b"\xe2\x82", b"\xac", b"\xff"])).map(
        b"".join
    ),
)


@st.composite
def split(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    """Bytes in pieces, as tokens hold them: single bytes, empty ones, all at once."""
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=len(whole))))
    return [whole[a:b] for a, b in itertools.pairwise([0, *cuts, len(whole)])]


def until_stop(text: str, stop: list[str]) -> str:
    """The text before the stop string that is complete first, the longest of those complete at once."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def held(text: str, stop: list[str]) -> str:
    """The longest end of the text that begins a stop string."""
    ends = [text[at:] for at in range(len(text))]
    return next((end for end in ends if any(s.startswith(end) for s in stop)), "")


@given(split(raw), stops)
@example([b"abc", b"d"], ["abcd", "bc"])  # the shorter is complete before the longer
@example([b"abcd"], ["abcd", "bc"])
@example([b"xab", b"c"], ["b", "abc"])
@example([b"\xf0\x9f\x98"], [])
@example([b"\xf0\x9f", b"\x98", b"\x80", b"!"], ["\U0001f600!"])
@example([b"\xf0\x9f", b"a"], ["\ufffda"])
def test_the_pieces_are_the_text_up_to_the_first_stop(pieces: list[bytes], stop: list[str]) -> None:
    assembler = TextAssembler(stop)
    text = "".join([assembler.push(piece) for piece in pieces] + [assembler.push(b"", final=True)])
    whole = b"".join(pieces).decode("utf-8", "replace")
    assert text == until_stop(whole, stop)
    assert assembler.stopped == any(s in whole for s in stop)


@given(split(raw), stops)
def test_the_last_token_may_come_with_the_end(pieces: list[bytes], stop: list[str]) -> None:
    apart, together = TextAssembler(stop), TextAssembler(stop)
    *first, last = pieces
    expected = [apart.push(piece) for piece in pieces] + [apart.push(b"", final=True)]
    found = [together.push(piece) for piece in first] + [together.push(last, final=True)]
    assert "".join(found) == "".join(expected)
    assert together.stopped == apart.stopped


@given(split(texts.map(str.encode)), stops)
def test_what_is_certain_is_returned_at_once_and_in_whole_characters(
    pieces: list[bytes], stop: list[str]
) -> None:
    text = b"".join(pieces).decode()
    lengths = [len(text[:n].encode()) for n in range(len(text) + 1)]
    assembler = TextAssembler(stop)
    returned = ""
    taken = 0
    for piece in pieces:
        taken += len(piece)
        complete = text[: sum(length <= taken for length in lengths) - 1]
        returned += assembler.push(piece)
        if assembler.stopped:
            assert returned == until_stop(complete, stop)
            break
        assert returned + held(complete, stop) == complete


@given(split(raw), st.lists(st.text("xyz", min_size=1), max_size=3))
def test_bytes_that_are_not_text_are_replaced_as_soon_as_they_are_known(
    pieces: list[bytes], stop: list[str]
) -> None:
    """At most an unfinished character is held back: three bytes."""
    assembler = TextAssembler(stop)
    pieces = [piece.translate(None, b"xyz") for piece in pieces]
    returned = ""
    for n, piece in enumerate(pieces):
        returned += assembler.push(piece)
        so_far = b"".join(pieces[: n + 1])
        tails = [
            so_far[: len(so_far) - cut].decode("utf-8", "replace") for cut in range(min(3, n + 3) + 1)
        ]
        assert returned in tails


def test_the_stop_that_is_complete_first_is_told() -> None:
    assembler = TextAssembler(["cd", "abcde", "b"])
    assert assembler.stopped_by is None
    assert assembler.push(b"abcde") == "a"
    assert assembler.stopped_by == "b"


@given(split(raw), st.binary(max_size=5), st.booleans())
def test_nothing_follows_a_stop(pieces: list[bytes], more: bytes, final: bool) -> None:
    assembler = TextAssembler(["a"])
    for piece in [*pieces, b"!a"]:
        assembler.push(piece)
    assert assembler.stopped_by == "a"
    assert assembler.push(more, final=final) == ""
    assert assembler.push(b"", final=True) == ""


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"Hi", b" there"], [], ["Hi", " there", ""]),
        ([b"\xe2", b"\x82", b"\xac"], [], ["", "", "€", ""]),
        ([b"\xe2\x82"], [], ["", "\ufffd"]),
        ([b"\xff", b"a"], [], ["\ufffd", "a", ""]),
        ([b"a\n", b"\n", b"b"], ["\n\n"], ["a", "", "", ""]),
        ([b"a\n", b"b"], ["\n\n"], ["a", "\nb", ""]),
        ([b"a\n"], ["\n\n"], ["a", "\n"]),
        ([b"ab", b"ab", b"x"], ["abx"], ["", "ab", "", ""]),
        ([b"aa", b"aa"], ["aab"], ["", "aa", "aa"]),
        ([b"one STOP two"], ["STOP", "two"], ["one ", ""]),
        ([b"one two STOP"], ["STOP", "two"], ["one ", ""]),
    ],
)
def test_pieces_by_hand(pieces: list[bytes], stop: list[str], expected: list[str]) -> None:
    assembler = TextAssembler(stop)
    assert [*map(assembler.push, pieces), assembler.push(b"", final=True)] == expected
