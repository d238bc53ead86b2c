"""A conversation becomes the token ids of each branch.

It is rendered by the model's own chat template. The template's markup may name control tokens; what
users, histories and preferences say may not.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np

from amulet_gguf.errors import PromptError, TemplateLimitError, shown
from amulet_gguf.method.arrays import Tokens
from amulet_gguf.method.vocabulary import Vocabulary
from amulet_gguf.prompts.messages import THOUGHT, add_to_digest, reshaped, split
from amulet_gguf.prompts.sandbox import CHATML, Renderer
from amulet_gguf.prompts.thoughts import IN_HISTORIES, OPENING, find_marks, follows
from amulet_gguf.prompts.tools import Tools, form_of, in_words

_THOUGHT_NAMES: Final = (THOUGHT, "reasoning", "thinking")  # in templates of different families
_MAX_BEGINNINGS: Final = 4096
_OPENS: Final = re.compile("|".join(re.escape(mark) for mark in IN_HISTORIES if mark in OPENING))
_CLOSES: Final = re.compile("|".join(re.escape(mark) for mark in IN_HISTORIES if mark not in OPENING))
_RECOGNIZED: Final = 40  # characters of a system prompt: a template may change the rest

# A noncharacter of Unicode, which no text holds: it marks where the name of a control token that
# appears in a message is cut in two.
_CUT: Final = "\ufdd0"


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation: its text, and (n,) int32 token ids."""

    text: str
    tokens: Tokens

    @property
    def prompt(self) -> str:
        """The text as people read it: without the places where names of control tokens are cut."""
        return self.text.replace(_CUT, "")


class Beginnings:
    """When conversations began, so that midnight does not change the prompts of those under way."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[datetime, datetime]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, messages: Sequence[Mapping[str, Any]]) -> datetime:
        """Return when a conversation that begins with the same turn of the user began. One that was not
        gone on with for a day is forgotten."""
        state = hashlib.sha256()
        for message in messages:
            add_to_digest(state, message)
            if message["role"] == "user":
                break
        now = datetime.now()
        with self._lock:
            began, used = self._known.pop(state.digest(), (now, now))
            if now - used > timedelta(days=1):
                began = now
            self._known[state.digest()] = began, now
            if len(self._known) > _MAX_BEGINNINGS:
                self._known.popitem(last=False)
        return began


class ChatTemplate:
    """A model's chat template, ready to encode conversations.

    Attributes:
        marks: of thoughts, or None: the model is not known to think.
        form: in which the model calls functions.
        beginnings: when its conversations began.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Compile the template.

        Raises:
            PromptError: the template is not valid.
        """
        self._vocabulary = vocabulary
        source = vocabulary.chat_template or CHATML
        self._renderer = Renderer(source)
        special = vocabulary.special_texts()  # the whole vocabulary is gone through: once
        self.marks = find_marks(source, special)
        self.form, self._knows_tools = form_of(source)
        self._special = _pattern(special)
        self._special_but_thoughts = _pattern(set(special) - IN_HISTORIES)
        self._names: Mapping[str, Any] = {}
        self._skips_thoughts = False
        self._tools: Tools | None = None
        self._date: str | None = None
        self.beginnings = Beginnings()

    def given(
        self,
        names: Mapping[str, Any],
        *,
        date: str | None = None,
        skips_thoughts: bool = False,
        tools: Tools | None = None,
    ) -> ChatTemplate:
        """Return the same template, which finds these values by their names.

        Args:
            date: what it takes for today, ISO 8601. None: the day on which a conversation began.
            skips_thoughts: answers begin at once.
            tools: that the model may call.
        """
        other = copy.copy(self)
        other._tools = tools
        if tools is not None and self._knows_tools:
            names = {**names, "tools": tools.described}
        try:
            other._names = {name: self._harmless(value) for name, value in names.items()}
        except RecursionError:
            raise PromptError("a value for the chat template is nested too deeply") from None
        other._date = date
        other._skips_thoughts = skips_thoughts
        return other

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        known: Encoded | None = None,
        began: datetime | None = None,
    ) -> Encoded:
        """Return the prompt of a conversation, with n >= 1 tokens.

        Args:
            messages: if the last is the assistant's, it is the beginning of an answer.
            known: tokens of a text that the prompt may begin with, such as that of the turns before.
                A model can write a text in other tokens than its tokenizer would, and those that it
                wrote are the ones that are cached.
            began: when the conversation did, for templates that tell the date; None: see `Beginnings`.

        Raises:
            PromptError: the template refuses the conversation, fails, or takes too long.
        """
        try:
            return self._encoded(messages, known, began)
        except RecursionError:
            raise PromptError("a value or a call in the messages is nested too deeply") from None

    def _encoded(
        self, messages: Sequence[Mapping[str, Any]], known: Encoded | None, began: datetime | None
    ) -> Encoded:
        asked, begun = split(messages)
        now = datetime.fromisoformat(self._date) if self._date else began or self.beginnings.of(messages)
        text = self._rendered(asked, now)
        if self.marks is not None and (begun or self._skips_thoughts):
            following = follows(self.marks, text)
            opens = next((mark for mark in self.marks.opens if begun.lstrip().startswith(mark)), None)
            if following == "thought" and opens is not None:
                begun = begun.lstrip().removeprefix(opens)  # the template has opened it
            elif following == "thought":
                text = text.rstrip() + self.marks.ending
            elif following == "open" and self._skips_thoughts:
                text += self.marks.skipping
        if begun:
            text += self._defuse({"role": "assistant", "content": begun})["content"]
        if not text.strip(f"{_CUT} \r\n\t"):
            raise PromptError("the chat template made an empty prompt")
        # Only where a special token follows is it certain that no token spans the place.
        if known and text.startswith(known.text) and self._special.match(text, len(known.text)):
            added = self._tokenize(text[len(known.text) :])
            return Encoded(text, np.concatenate([known.tokens, added]))
        return Encoded(text, self._with_bos(self._tokenize(text)))

    def encode_text(self, text: str | Sequence[int], preference: str | None) -> Tokens:
        """Return the tokens of a text that the model is to go on with, after a preference if any.

        Args:
            text: or its tokens, to which nothing is added but the preference.

        Raises:
            PromptError: it is empty, or a token is not of the vocabulary.
        """
        if isinstance(text, str) and text:
            if preference:
                text = f"{preference}\n\n{text}"
            return self._with_bos(self._vocabulary.tokenize(text))
        try:
            given = list(map(operator.index, text))  # type: ignore[arg-type]
        except TypeError:
            raise PromptError(f"expected a text or its tokens, got {shown(text)}") from None
        if not given:
            raise PromptError("the prompt is empty: give a text to go on with")
        n_vocab = self._vocabulary.n_vocab
        wrong = next((token for token in given if not 0 <= token < n_vocab), None)
        if wrong is not None:
            raise PromptError(f"there is no token {shown(wrong)}: the model has {n_vocab}")
        tokens = np.array(given, np.int32)
        if not preference:
            return tokens
        n_first = int(tokens[0] == self._vocabulary.bos)  # it stays the first
        before = self._vocabulary.tokenize(f"{preference}\n\n")
        return np.concatenate([tokens[:n_first], before, tokens[n_first:]])

    def encode_markup(self, text: str) -> Tokens:
        """Return the tokens of a text that was rendered elsewhere: names of control tokens mean them."""
        return self._with_bos(self._vocabulary.tokenize(text, special=True))

    def _with_bos(self, tokens: Tokens) -> Tokens:
        bos = self._vocabulary.bos
        if self._vocabulary.adds_bos and bos >= 0 and (not len(tokens) or tokens[0] != bos):
            tokens = np.concatenate([np.array([bos], np.int32), tokens])
        return tokens

    def answered(self, prompt: Encoded, answer: str, tokens: Sequence[int] | None = None) -> Encoded:
        """Return a prompt with an answer to it, as the next prompt of the conversation may begin.

        Args:
            tokens: of the answer; None: as the tokenizer has them.
        """
        text = self._defuse({"role": "assistant", "content": answer})["content"]
        if tokens is None:
            tokens = self._vocabulary.tokenize(answer).tolist()
        return Encoded(prompt.text + text, np.concatenate([prompt.tokens, np.array(tokens, np.int32)]))

    def _tokenize(self, text: str) -> Tokens:
        parts = [self._vocabulary.tokenize(part, special=True) for part in text.split(_CUT)]
        return np.concatenate(parts)

    def _defuse(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Cut the names of special tokens in two, so that tokenization cannot recognize them.

        The assistant's keep the marks of thoughts, by which templates know what to leave out.
        """
        if message["role"] != "assistant":
            return {**message, "content": self._cut(message["content"])}
        if "tool_calls" in message:
            message = {**message, "tool_calls": self._harmless(message["tool_calls"])}
        content = self._cut(message["content"], self._special_but_thoughts)
        # A template that takes a mark out would join what stands before and behind it.
        content = _CLOSES.sub(lambda match: match[0] + _CUT, content)
        content = _OPENS.sub(lambda match: (_CUT if match.start() else "") + match[0], content)
        if THOUGHT not in message:
            return {**message, "content": content}
        thought = self._cut(message[THOUGHT]) + _CUT
        return {**message, "content": content, **dict.fromkeys(_THOUGHT_NAMES, thought)}

    def _cut(self, text: str, names: re.Pattern[str] | None = None) -> str:
        text = text.replace(_CUT, "").encode("utf-8", "replace").decode()
        return (names or self._special).sub(lambda match: match[0] + _CUT, text)

    def _harmless(self, value: Any) -> Any:
        """Cut the names in a value for the template, which may come from anywhere."""
        if isinstance(value, str):
            return self._cut(value)
        if isinstance(value, list):
            return [self._harmless(each) for each in value]
        if isinstance(value, dict):
            return {self._cut(key): self._harmless(each) for key, each in value.items()}
        return value

    def _rendered(self, messages: Sequence[Mapping[str, Any]], now: datetime) -> str:
        """Render messages, in another form if the template refuses them as they are, or leaves a system
        prompt out."""
        words = in_words(messages, self._tools)
        has_calls = words != messages
        forms = [(messages, self._names)] if self._knows_tools or not has_calls else []
        plain = {name: value for name, value in self._names.items() if name != "tools"}
        forms += [(words, plain)] * has_calls
        refused: PromptError | None = None
        for form, names in forms:
            whole = [self._defuse(message) for message in form]
            for each in (whole, *reshaped(whole)):
                try:
                    return self._render(each, now, names)
                except TemplateLimitError:  # noqa: PERF203
                    raise
                except PromptError as error:
                    refused = refused or error
        assert refused is not None
        raise refused from None

    def _render(
        self, messages: Sequence[Mapping[str, Any]], now: datetime, given: Mapping[str, Any]
    ) -> str:
        vocabulary = self._vocabulary
        names = {
            name: vocabulary.token_text(token) if token >= 0 else ""
            for name, token in (("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos))
        }
        text = self._renderer.render(messages, now, {**names, **given})
        for message in messages:
            beginning = message["content"].strip().split("\n")[0][:_RECOGNIZED]
            if message["role"] == "system" and beginning not in text:
                raise PromptError("the chat template leaves the system prompt out")
        return text


def _pattern(special: Iterable[str]) -> re.Pattern[str]:
    # Looking ahead, so that every place where a special text begins is found, overlapping or not.
    # Its first character is matched too: after it comes the cut.
    texts = [re.escape(text) for text in special if len(text) > 1]
    return re.compile(f"(?={'|'.join(texts)})." if texts else "(?!)", re.DOTALL)
