"""Calls of functions in what a model writes: told from text, and followed token by token."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from amulet_gguf.engine.answer import CallPart
from amulet_gguf.errors import EngineError
from amulet_gguf.method.vocabulary import Vocabulary
from amulet_gguf.prompts.grammars import Matcher, closed
from amulet_gguf.prompts.tools import HERMES, Form, Tools

_MAX_BARE: Final = 16  # functions whose calls are recognized without tags
#: How models lay out the JSON of a call, up to the value of its arguments.
_LAYOUTS: Final = (
    '{{"name": {}, "arguments":',
    '{{\n  "name": {},\n  "arguments":',
    '{{\n    "name": {},\n    "arguments":',
)
#: What may stand around it instead of tags.
_FENCES: Final = (("", ""), ("```json\n", "\n```"))


@dataclass(frozen=True)
class Way:
    """A way in which a call may begin.

    Attributes:
        form: of the call.
        grammar: of what follows what it opens with.
        name: of the function, where that tells it already.
    """

    form: Form
    grammar: Matcher
    name: str | None = None


def ways(
    form: Form,
    tools: Tools,
    vocabulary: Vocabulary,
    compiled: Callable[[str, Mapping[str, Any]], Matcher],
) -> list[Way]:
    """Return how calls may begin: as the family writes them, and with models that forget the tags
    around them, as JSON that an answer begins with, or a block of it.

    Args:
        compiled: gives the matcher of a grammar in llguidance's dialect of Lark, made of schemas.

    Raises:
        SettingError: the schema of a function's arguments is not valid or not supported.
    """
    rules = [
        f"{_lark(form.before, vocabulary)} {_lark(name + form.between, vocabulary)} "
        f"%json {json.dumps(closed(schema))} {_lark(form.after, vocabulary)}"
        for name, schema in tools.callable.items()
    ]
    found = [Way(form, compiled(_any_of(rules), tools.callable))]
    if form.between == HERMES.between and not tools.is_needed and len(rules) <= _MAX_BARE:
        for (name, schema), (opens, closes) in itertools.product(tools.callable.items(), _FENCES):
            after = "}" + closes
            rule = f'" "? %json {json.dumps(closed(schema))} /[ \\n]{{0,8}}/ {_quoted(after)}'
            grammar = compiled(_any_of([rule]), {name: schema})
            for layout in _LAYOUTS:
                begin = opens + layout.format(json.dumps(name))
                found.append(Way(Form(begin, "", "", after, "", (), is_alone=True), grammar, name))
    return found


def _any_of(rules: Sequence[str]) -> str:
    names = " | ".join(f"call_{i}" for i in range(len(rules)))
    return "\n".join([f"start: {names}", *(f"call_{i}: {rule}" for i, rule in enumerate(rules))])


def _lark(text: str, vocabulary: Vocabulary) -> str:
    """Return a text as a part of a rule: control tokens in it by their numbers, for they have no text.

    A line that it begins with may be missing.
    """
    if text.startswith("\n"):
        return f'"\\n"? {_lark(text[1:], vocabulary)}'
    parts, rest = [], text
    for token in vocabulary.tokenize(text, special=True).tolist() if text else ():
        if not vocabulary.token_bytes(token):
            before, _, rest = rest.partition(vocabulary.token_text(token))
            parts += [_quoted(before), f"<[{token}]>"]
    return " ".join(filter(None, [*parts, _quoted(rest)]))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


class Calling:
    """Follows the calls in one answer (see `amulet_gguf.engine.request.Calls`).

    Attributes:
        grammar: of the call under way; None: there is none.
        is_over: nothing may follow.
    """

    def __init__(self, ways: Sequence[Way], tools: Tools, vocabulary: Vocabulary) -> None:
        self._ways, self._tools, self._vocabulary = ways, tools, vocabulary
        self._marks = "".join(way.form.all for way in ways)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # it may begin a call, or end what closes one
        self._is_said = False  # there was text
        self._n_calls = 0  # begun
        self._way = ways[0]  # of the last call
        self._name: str | None = None  # of its function
        self._body = ""  # what was written of it
        self._n_told = 0  # characters of that which were handed on, or are no arguments
        self.grammar: Matcher | None = None
        self.is_over = False

    def anew(self) -> Calling:
        """Return one for an answer of which nothing was written."""
        return Calling(self._ways, self._tools, self._vocabulary)

    @property
    def has_called(self) -> bool:
        """Whether a call was begun."""
        return self._n_calls > 0

    @property
    def holds(self) -> bool:
        """Whether what was written last may be the beginning of a call."""
        return bool(self._held.strip())

    @property
    def is_needed(self) -> bool:
        """Whether a call must come next."""
        is_opening = self._ways[0].form.opens.startswith(self._held)
        return self._tools.is_needed and not self.has_called and is_opening

    @cached_property
    def opening(self) -> Sequence[int]:
        """The tokens that open a call."""
        opens = self._ways[0].form.opens
        return [int(token) for token in self._vocabulary.tokenize(opens, special=True)]

    def push(self, token: int, data: bytes) -> list[str | CallPart]:
        """Take a token, of which `data` belongs to the answer; return what is now certain, in order."""
        text = self._decoder.decode(data or self._spelled(token))
        if self.grammar is not None:
            return self._take(text, token, data)
        self._held += text
        for way in self._ways:
            if way.form.is_alone and self._is_said:
                continue
            at = self._held.find(way.form.opens)
            is_late = way.form.is_alone and self._held[:at].strip()
            if at >= 0 and not is_late:
                held, self._held = self._held, ""
                rest = held[at + len(way.form.opens) :]
                self._begin(way)
                try:
                    part = self._take(rest, token, rest.encode()) if rest else []
                except EngineError:  # one token with what no call goes on with
                    self.grammar, self._n_calls = None, self._n_calls - 1
                    return self._said(held)
                return [*self._said(held[:at], before=True), *part]
        keep = self._n_to_hold()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._said(certain)

    def end(self) -> list[str | CallPart]:
        """Return what was held back: nothing follows."""
        text, self._held = self._held + self._decoder.decode(b"", True), ""
        if self.grammar is not None:  # cut off in a call
            return self._arguments(len(self._body))
        return self._said(text)

    def _begin(self, way: Way) -> None:
        self._way, self.grammar = way, way.grammar.anew()
        self._body, self._n_told, self._name = "", 0, None
        self._n_calls += 1

    def _take(self, text: str, token: int, data: bytes) -> list[str | CallPart]:
        """Take what belongs to the call under way."""
        assert self.grammar is not None
        self._body += text
        is_done = self.grammar.push(token, data)
        end = max(0, len(self._body) - len(self._way.form.after))
        found = self._arguments(len(self._body[:end].rstrip()))
        if is_done:
            self.grammar = None
            self.is_over = not self._tools.is_parallel
        return found

    def _arguments(self, end: int) -> list[str | CallPart]:
        """Return what is new of the call under way, up to a place in its text."""
        found: list[str | CallPart] = []
        if self._name is None:
            self._name = self._named()
            if self._name is None:
                return []
            found.append(CallPart(self._n_calls - 1, self._name, ""))
        if end > self._n_told:
            found.append(CallPart(self._n_calls - 1, None, self._body[self._n_told : end]))
            self._n_told = end
        return found

    def _named(self) -> str | None:
        """Return the name of the function, once it is all there."""
        if self._way.name is not None:
            self._n_told = len(self._body) - len(self._body.lstrip())
            return self._way.name if self._body.strip() else None
        form, start = self._way.form, len(self._body) - len(self._body.lstrip("\n"))
        before = form.before.removeprefix("\n")
        name, between, _ = self._body[start:].removeprefix(before).partition(form.between)
        if not between:
            return None
        self._n_told = start + len(before) + len(name) + len(between)
        return name

    def _said(self, text: str, before: bool = False) -> list[str | CallPart]:
        """Return text for people: without what closes a call, and white space around calls.

        Args:
            before: it stands before the call that was begun last.
        """
        closes = self._way.form.closes.strip()
        if self._n_calls > before:
            text = text.replace(closes, "") if closes else text
            text = text if text.strip() else ""
        self._is_said |= bool(text.strip())
        return [text] if text else []

    def _n_to_hold(self) -> int:
        """Return how many characters at the end of what is held may begin a mark."""
        held = self._held
        if self.has_called and not held.strip():  # white space before another call
            return len(held)
        for way in self._ways:
            if way.form.is_alone and not self._is_said and way.form.opens.startswith(held.lstrip()):
                return len(held)
        marks = [way.form.opens for way in self._ways if not way.form.is_alone]
        marks += [self._way.form.closes.strip()] * self.has_called
        for n in range(min(max(map(len, marks), default=0), len(held)), 0, -1):
            if any(mark.startswith(held[-n:]) for mark in marks):
                return n
        return 0

    def _spelled(self, token: int) -> bytes:
        """Control tokens have no text, but are parts of forms."""
        name = self._vocabulary.token_text(token)
        return name.encode() if name and name in self._marks else b""
