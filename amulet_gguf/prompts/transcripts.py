"""What a model wrote, in the tokens that it wrote, as the beginning of prompts to come.

A model can write a text in other tokens than its tokenizer would. Those that it wrote are the ones that
its cache holds, so that a conversation that goes on must begin with them, or it is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from amulet_gguf.prompts.messages import Message, add_to_digest
from amulet_gguf.prompts.template import ChatTemplate, Encoded

_MAX_ANSWERS: Final = 64


@dataclass
class _Answer:
    """An answer to messages; `encoded`, once it was needed, is all of it up to its end."""

    messages: Sequence[Message]
    text: str
    tokens: Sequence[int]
    encoded: Encoded | None = None


class Transcripts:
    """The last answers of a model, found again by the conversation that they belong to.

    Messages are those of a base branch, without preferences. `note` may be called from any thread, and
    costs nothing: an answer is encoded when its conversation goes on.

    Attributes:
        template: that renders them.
    """

    def __init__(self, template: ChatTemplate, token_bytes: Callable[[int], bytes]) -> None:
        self.template = template
        self._token_bytes = token_bytes
        self._noted: deque[tuple[Sequence[Message], Sequence[int]]] = deque(maxlen=_MAX_ANSWERS)
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._lock = threading.RLock()

    def note(self, messages: Sequence[Message], tokens: Sequence[int]) -> None:
        """Remember the tokens of an answer to messages."""
        self._noted.append((messages, tokens))

    def learn(self, messages: Sequence[Message], encoded: Encoded) -> None:
        """Remember a conversation up to the end of its last answer, as it was encoded before."""
        *before, last = messages
        with self._lock:
            self._add(_Answer(before, last["content"], (), encoded))

    def known(self, messages: Sequence[Message]) -> Encoded | None:
        """Return the longest beginning of a conversation that ends with an answer of the model."""
        with self._lock:
            while self._noted:
                asked, tokens = self._noted.popleft()
                parts = [self._token_bytes(token) for token in tokens]
                # Control tokens, and halves of characters, are not what their text says.
                with contextlib.suppress(UnicodeDecodeError):
                    if all(parts):
                        self._add(_Answer(asked, b"".join(parts).decode(), tokens))
            for key in reversed(list(_keys(messages))):
                if key in self._answers:
                    self._answers.move_to_end(key)
                    return self._encoded(self._answers[key])
        return None

    def whole(self, messages: Sequence[Message]) -> Encoded:
        """Return a conversation up to the end of its last answer, whoever wrote that."""
        known = self.known(messages)
        *before, last = messages
        whole = self.template.answered(self.template.encode(before, self.known(before)), last["content"])
        return known if known is not None and known.text == whole.text else whole

    def _add(self, answer: _Answer) -> None:
        *_, key = _keys([*answer.messages, {"role": "assistant", "content": answer.text}])
        self._answers.setdefault(key, answer)
        self._answers.move_to_end(key)
        if len(self._answers) > _MAX_ANSWERS:
            self._answers.popitem(last=False)

    def _encoded(self, answer: _Answer) -> Encoded:
        if answer.encoded is None:
            prompt = self.template.encode(answer.messages, self.known(answer.messages))
            answer.encoded = self.template.answered(prompt, answer.text, answer.tokens)
        return answer.encoded


def _keys(messages: Sequence[Message]) -> Iterator[bytes]:
    """Yield a digest of each beginning of a conversation that ends with an answer."""
    state = hashlib.sha256()
    for message in messages:
        add_to_digest(state, message)
        if message["role"] == "assistant":
            yield state.copy().digest()
