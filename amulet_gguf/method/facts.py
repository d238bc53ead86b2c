"""Names, numbers, quotations and code: what an answer says, which no preference is to change.

Amplifying a preference inside them gives other names and other numbers, not another style. They are told
by how they are written: where all nouns begin with a capital, all are taken for names, and where a
script has no capitals, none.
"""

from __future__ import annotations

from typing import Final

_ENDS: Final = ".!?:…。！？：\n"  # of a sentence, or of what introduces one
_MARKS: Final = " \t*_#>-•–—()[]\"'“”‘’«»"
_DIGITS: Final = "0123456789"
_LOOK_BACK: Final = 80  # characters
_FENCE: Final = "```"


class Facts:
    """Follows an answer as it is written, and says whether a fact goes on or begins."""

    def __init__(self) -> None:
        self._line = ""
        self._is_fenced = False
        self._is_in_word = False  # a name or a number

    def include(self, token: bytes) -> bool:
        """Tell whether a token would be of a fact, were it written next."""
        text = token.decode(errors="ignore")
        return self._is_fenced or self._is_quoted or self._is_word(text)

    def push(self, token: bytes) -> None:
        """Go on behind a token that was written."""
        text = token.decode(errors="ignore")
        self._is_in_word = self._is_word(text)
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            self._is_fenced ^= line.lstrip().startswith(_FENCE)
        self._line = rest

    @property
    def _is_quoted(self) -> bool:
        """A quotation or code is open; at the end of its line it is not any more.

        A line that begins with a quotation mark is speech, or the whole answer.
        """
        line = self._line
        if line.count("`") % 2:
            return True
        if line.lstrip()[:1] in ('"', "“", "«"):
            return False
        is_open = line.count("“") > line.count("”") or line.count("«") > line.count("»")
        return is_open or line.count('"') % 2 == 1

    def _is_word(self, text: str) -> bool:
        word = text.lstrip(" ")
        if self._is_in_word and text[:1].isalnum():
            return True
        if not word[:1].isdigit() and not (word[:1].isupper() and word.strip() != "I"):
            return False
        before = self._line[-_LOOK_BACK:].rstrip(_MARKS + _DIGITS if word[:1].isupper() else _MARKS)
        begins = not before or (word[:1].isupper() and before[-1] in _ENDS)
        return not begins and (text[:1] == " " or not self._line[-1:].isalnum())
