"""Messages and preferences become the token ids of each branch.

The conversation is rendered by the model's own chat template. The template's markup may name control
tokens; what users, histories and preferences say may not.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any, Final

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from amulet_gguf.errors import PromptError, SettingError
from amulet_gguf.method.arrays import Tokens
from amulet_gguf.method.vocabulary import Vocabulary
from amulet_gguf.settings import Placement

Message = Mapping[str, str]

#: Used for models that bring no template of their own, as llama.cpp does.
CHATML: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ROLES: Final = ("system", "user", "assistant")
_MAX_TEMPLATE: Final = 262_144  # characters; real ones have a tenth of it
_MAX_REPEATED: Final = 100_000  # items or characters of "x" * n in a template
_MAX_PROMPT: Final = 4_000_000  # characters; far more than a context holds
_MAX_SECONDS: Final = 2.0  # a template works for milliseconds

# A noncharacter of Unicode, which no text holds: it marks where the name of a control token that
# appears in a message is cut in two.
_CUT: Final = "\ufdd0"


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation: its text, and (n,) int32 token ids."""

    text: str
    tokens: Tokens


def conversation(
    prompt: str | None, messages: Sequence[Message] | None, system: str | None
) -> list[dict[str, str]]:
    """Return the messages of a request in one form, checked.

    Args:
        prompt: the user's message, or None.
        messages: a conversation ending with a user's message, or None. One of the two is given.
        system: a system prompt to begin with, or None.

    Raises:
        PromptError: nothing to answer, or messages of an unknown form.
    """
    if (prompt is None) == (messages is None):
        raise PromptError("give either a prompt or messages")
    if messages is None:
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt must be a text, got {type(prompt).__name__}")
        messages = [{"role": "user", "content": prompt}]
    checked = [_checked(message) for message in messages]
    if not checked or checked[-1]["role"] != "user":
        raise PromptError("the conversation must end with a message of the user")
    if not checked[-1]["content"].strip():
        raise PromptError("the prompt is empty: say what to write about")
    if system is not None:
        if checked[0]["role"] == "system":
            raise PromptError("the messages have a system prompt already: give it in one place")
        checked.insert(0, {"role": "system", "content": system})
    return checked


def _checked(message: Message) -> dict[str, str]:
    try:
        role, content = message["role"], message["content"]
    except (TypeError, KeyError):
        raise PromptError(f"a message needs a role and content, got {message!r}") from None
    if role not in _ROLES:
        raise PromptError(f"a message's role must be one of {', '.join(_ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise PromptError(f"a message's content must be a text, got {type(content).__name__}")
    return {"role": role, "content": content}


def with_preference(
    messages: Sequence[Message], preference: str | None, placement: Placement
) -> list[dict[str, str]]:
    """Return the conversation of one branch; None as preference gives that of the base.

    All branches differ in the preference alone. With placement "system" the base therefore has a
    system prompt too, if only an empty one: a template's default would be in its branch and not in
    the others.
    """
    branch = [dict(message) for message in messages]
    if placement == "turn":
        if preference:
            branch[-1]["content"] += "\n\n" + preference
    elif placement == "system":
        if branch[0]["role"] != "system":
            branch.insert(0, {"role": "system", "content": ""})
        content = branch[0]["content"]
        if preference:
            space = " " if content and not content[-1].isspace() else ""
            branch[0]["content"] = content + space + preference
    else:
        raise SettingError(f"unknown placement {placement!r}")
    return branch


class ChatTemplate:
    """A model's chat template, ready to encode conversations.

    The template comes with the model file and is not trusted: it runs in a sandbox without access to
    Python's internals, for at most two seconds, and cannot ask for huge strings by multiplication.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Compile the template.

        Raises:
            PromptError: the template is not valid.
        """
        source = vocabulary.chat_template or CHATML
        if len(source) > _MAX_TEMPLATE:
            raise PromptError(f"the model's chat template is too long: {len(source)} characters")
        self._vocabulary = vocabulary
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # SyntaxError and ValueError of generated code too
            raise PromptError(f"the model's chat template is not valid: {_reason(error)}") from None

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        # Looking ahead, so that every place where a special text begins is found, overlapping or not.
        # Its first character is matched too: after it comes the cut.
        texts = [re.escape(text) for text in self._vocabulary.special_texts() if len(text) > 1]
        return re.compile(f"(?={'|'.join(texts)})." if texts else "(?!)", re.DOTALL)

    def encode(self, messages: Sequence[Message], known: Encoded | None = None) -> Encoded:
        """Return the prompt of a conversation, with n >= 1 tokens.

        Args:
            known: tokens of a text that the prompt may begin with, such as that of the turns before.
                A model can write a text in other tokens than its tokenizer would, and those that it
                wrote are the ones that are cached.

        Raises:
            PromptError: the template refuses the conversation, fails, or takes too long.
        """
        harmless = [self._defuse(message) for message in messages]
        try:
            text = self._render(harmless)
        except PromptError:
            if harmless[0]["role"] != "system" or len(harmless) == 1:
                raise
            # Some templates know no system prompt; it then opens the first message instead.
            system, first, *rest = harmless
            content = f"{system['content']}\n\n{first['content']}".strip()
            text = self._render([{"role": first["role"], "content": content}, *rest])
        if len(text) > _MAX_PROMPT:
            raise PromptError(f"the model's chat template made a prompt of {len(text)} characters")
        if not text.strip(f"{_CUT} \r\n\t"):
            raise PromptError("the model's chat template made an empty prompt")
        # Only where a special token follows is it certain that no token spans the place.
        if known and text.startswith(known.text) and self._special.match(text, len(known.text)):
            added = self._tokenize(text[len(known.text) :])
            return Encoded(text, np.concatenate([known.tokens, added]))
        return Encoded(text, self._with_bos(self._tokenize(text)))

    def encode_text(self, text: str, preference: str | None) -> Tokens:
        """Return the tokens of a text that the model is to go on with, after a preference if any.

        Raises:
            PromptError: it is empty.
        """
        if not text:
            raise PromptError("the prompt is empty: give a text to go on with")
        if preference:
            text = f"{preference}\n\n{text}"
        return self._with_bos(self._vocabulary.tokenize(text))

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

    def _defuse(self, message: Message) -> dict[str, str]:
        """Cut the names of special tokens in two, so that tokenization cannot recognize them."""
        content = message["content"].replace(_CUT, "").encode("utf-8", "replace").decode()
        if self._special.search(content):
            content = self._special.sub(lambda match: match[0] + _CUT, content)
        return {"role": message["role"], "content": content}

    def _render(self, messages: list[dict[str, str]]) -> str:
        vocabulary = self._vocabulary
        names = {
            name: vocabulary.token_text(token) if token >= 0 else ""
            for name, token in (("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos))
        }
        outer = sys.gettrace()
        sys.settrace(_time_limit())
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **names)
        except Exception as error:  # whatever a template can make Python raise
            raise PromptError(f"the model's chat template failed: {_reason(error)}") from None
        finally:
            sys.settrace(outer)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = 1
        for value, other in ((left, right), (right, left)):
            if isinstance(other, int) and isinstance(value, (str, bytes, list, tuple)):
                size = len(value) * other
        if operator == "**" or size > _MAX_REPEATED:
            raise jinja2.exceptions.SecurityError(f"refused to compute {operator} in a template")
        return super().call_binop(context, operator, left, right)


def _time_limit() -> Any:
    """Return a trace function that ends what it traces when its time is over."""
    deadline = time.monotonic() + _MAX_SECONDS

    def trace(_frame: FrameType, _event: str, _arg: Any) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {_MAX_SECONDS:g} seconds")
        return trace

    return trace


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
