"""Bytes of tokens become text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Assembles the text of one generation.

    A token may hold part of a character, and a stop string may be spread over several tokens. Text is
    held back until it can be neither; joined, all that is returned is the text up to the first stop
    string. Bytes that are not UTF-8 become U+FFFD.

    Attributes:
        stopped_by: the stop string that was found; nothing follows.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self.stopped_by is not None

    def push(self, data: bytes, *, final: bool = False) -> str:
        """Take a token's bytes and return the text that is now certain.

        Args:
            data: the bytes of one token.
            final: no more bytes will follow; return all that was held back.
        """
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, final)
        # The stop string that is complete first, however the text is divided into tokens.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)
            self._held = ""
            return text[:at]
        keep = 0 if final else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
