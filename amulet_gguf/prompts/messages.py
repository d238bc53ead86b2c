"""Messages: what a conversation is made of, in one form, and what the branches add to it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from amulet_gguf.errors import PromptError, SettingError, shown
from amulet_gguf.settings import Placement

#: As they are given: "role" and "content", a text or a list of {"type": "text", "text": …}; the
#: assistant's may have `THOUGHT`, which the model's template keeps or drops.
Message = Mapping[str, Any]

#: What the assistant thought before it said something.
THOUGHT: Final = "reasoning_content"
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def conversation(
    prompt: str | None, messages: Sequence[Message] | None, system: str | None
) -> list[dict[str, str]]:
    """Return the messages of a request in one form, checked.

    Args:
        prompt: the user's message, or None.
        messages: a conversation that ends with a user's message, or with the beginning of the answer to
            it, or None. One of the two is given.
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
    if checked and checked[-1] == {"role": "assistant", "content": ""}:
        checked.pop()  # nothing was begun
    asked, begun = split(checked)
    if not asked or asked[-1]["role"] != "user":
        raise PromptError(
            "the conversation must end with a message of the user, or the beginning of the answer to it"
        )
    if not asked[-1]["content"].strip() and not begun.strip():
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
        raise PromptError(f"a message needs a role and content, got {shown(message)}") from None
    if not isinstance(role, str) or role not in _ROLES:
        raise PromptError(f"a message's role must be one of {', '.join(_ROLES)}, got {shown(role)}")
    checked = {"role": _ROLES[role], "content": _text(role, content)}
    thought = message.get(THOUGHT)
    if role == "assistant" and isinstance(thought, str):
        checked[THOUGHT] = thought
    return checked


def _text(role: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise PromptError(
            f"a message's content must be a text or a list of parts, got {type(content).__name__}"
        )
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise PromptError(f"a part of a message must be a text, got {shown(part)}")
    return "".join(part["text"] for part in content)


def split(messages: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], str]:
    """Return what is to be answered, and how the answer begins: "" if it is not begun."""
    if messages and messages[-1]["role"] == "assistant":
        return list(messages[:-1]), messages[-1]["content"]
    return list(messages), ""


def with_preference(
    messages: Sequence[Mapping[str, str]], preference: str | None, placement: Placement
) -> list[dict[str, str]]:
    """Return the conversation of one branch; None as preference gives that of the base.

    All branches differ in the preference alone. With placement "system" the base therefore has a
    system prompt too, if only an empty one: a template's default would be in its branch and not in
    the others.
    """
    branch = [dict(message) for message in messages]
    if placement == "turn":
        if preference:
            last = next(each for each in reversed(branch) if each["role"] == "user")
            last["content"] += "\n\n" + preference
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


def add_to_digest(state: hashlib._Hash, message: Message) -> None:
    """Tell a hash who said what, so that no two conversations look the same."""
    for part in (message["role"], message["content"]):
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)


def reshaped(messages: Sequence[Mapping[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Yield other forms of a conversation for a template that refuses it, the nearest first.

    Neighbours of one role become one message. System prompts open the next turn of the user, those in
    the middle sooner than one at the front. Where the assistant begins, the user said nothing before.
    """
    tried = [list(map(dict, messages))]
    for fold, opens in itertools.product((lambda m: m, _fold_later, _fold), (False, True)):
        form = _merged(_opened(fold(tried[0])) if opens else fold(tried[0]))
        if form not in tried:
            tried.append(form)
            yield form


def _merged(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = {**merged[-1], "content": _joined(merged[-1], message)}
        else:
            merged.append(message)
    return merged


def _joined(*messages: Mapping[str, str]) -> str:
    return "\n\n".join(each["content"] for each in messages if each["content"].strip())


def _fold(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    folded: list[dict[str, str]] = []
    waiting: list[dict[str, str]] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message)
        elif message["role"] == "user" and waiting:
            folded.append({**message, "content": _joined(*waiting, message)})
            waiting = []
        else:
            folded.append(message)
    for i in reversed(range(len(folded) if waiting else 0)):  # no turn of the user came behind
        if folded[i]["role"] == "user":
            folded[i] = {**folded[i], "content": _joined(folded[i], *waiting)}
            break
    return folded


def _fold_later(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    is_first = bool(messages) and messages[0]["role"] == "system"
    return [*messages[:is_first], *_fold(messages[is_first:])]


def _opened(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    first = next((i for i, each in enumerate(messages) if each["role"] != "system"), len(messages))
    if first == len(messages) or messages[first]["role"] == "user":
        return list(messages)
    return [*messages[:first], {"role": "user", "content": ""}, *messages[first:]]
