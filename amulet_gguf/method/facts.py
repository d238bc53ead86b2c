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
        self._is_quoted = self._is_ticked = False  # on this line
        self._is_in_word = False  # a name or a number

    def include(self, token: bytes) -> bool:
        """Tell whether a token would be of a fact, were it written next."""
        if self._is_fenced or self._is_ticked:
            return True
        # A line that begins with a quotation mark is speech, or the whole answer.
        is_quoted = self._is_quoted and self._line.lstrip()[:1] not in ('"', "“", "«")
        return is_quoted or self._is_word(token.decode(errors="ignore"))

    def push(self, token: bytes) -> None:
        """Go on behind a token that was written."""
        text = token.decode(errors="ignore")
        self._is_in_word = self._is_word(text)
        for sign in text:
            if sign == "\n":
                self._is_fenced ^= self._line.lstrip().startswith(_FENCE)
                self._line, self._is_quoted, self._is_ticked = "", False, False
                continue
            if sign == "`":
                self._is_ticked = not self._is_ticked
            elif sign in "“«":
                self._is_quoted = True
            elif sign in "”»":
                self._is_quoted = False
            elif sign == '"':  # it opens behind a space or a bracket: 6'2" is none
                self._is_quoted = not self._is_quoted and not self._line[-1:].isalnum()
            self._line += sign

    def _is_word(self, text: str) -> bool:
        word = text.lstrip(" ")
        if self._is_in_word and text[:1].isalnum():
            return True
        if not word[:1].isdigit() and not (word[:1].isupper() and word.strip() != "I"):
            return False
        before = self._line[-_LOOK_BACK:].rstrip(_MARKS + _DIGITS if word[:1].isupper() else _MARKS)
        begins = not before or (word[:1].isupper() and before[-1] in _ENDS)
        return not begins and (text[:1] == " " or not self._line[-1:].isalnum())
