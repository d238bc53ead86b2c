"""Messages: what a conversation is made of, in one form, and what the branches add to it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from amulet_gguf.errors import PromptError, SettingError, shown
from amulet_gguf.settings import Placement

#: As they are given: "role" and "content", a text or a list of {"type": "text", "text": …}; the
#: assistant's may have `THOUGHT`, which the model's template keeps or drops, and "tool_calls" as
#: OpenAI's API has them; to one of these answers a message of the role "tool" with its "tool_call_id".
Message = Mapping[str, Any]

#: What the assistant thought before it said something.
THOUGHT: Final = "reasoning_content"
_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def conversation(
    prompt: str | None, messages: Sequence[Message] | None, system: str | None
) -> list[dict[str, Any]]:
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
    if not isinstance(messages, Iterable):
        raise PromptError(f"expected a list of messages, got {shown(messages)}")
    checked = [_checked(message) for message in messages]
    if checked and checked[-1] == {"role": "assistant", "content": ""}:
        checked.pop()  # nothing was begun
    asked, begun = split(checked)
    if not asked or asked[-1]["role"] not in ("user", "tool"):
        raise PromptError(
            "the conversation must end with a message of the user, or the beginning of the answer to it"
        )
    if not any(message["role"] == "user" for message in asked):
        raise PromptError("the conversation needs a message of the user")
    if asked[-1]["role"] == "user" and not asked[-1]["content"].strip() and not begun.strip():
        raise PromptError("the prompt is empty: say what to write about")
    if system is not None:
        if checked[0]["role"] == "system":
            raise PromptError("the messages have a system prompt already: give it in one place")
        checked.insert(0, {"role": "system", "content": system})
    return checked


def _checked(message: Message) -> dict[str, Any]:
    try:
        role, content = message["role"], message["content"]
    except (TypeError, KeyError):
        raise PromptError(f"a message needs a role and content, got {shown(message)}") from None
    if not isinstance(role, str) or role not in _ROLES:
        raise PromptError(f"a message's role must be one of {', '.join(_ROLES)}, got {shown(role)}")
    checked: dict[str, Any] = {"role": _ROLES[role], "content": _text(role, content)}
    thought = message.get(THOUGHT)
    if role == "assistant" and isinstance(thought, str):
        checked[THOUGHT] = thought
    if role == "assistant" and message.get("tool_calls"):
        checked["tool_calls"] = _calls(message["tool_calls"])
    if role == "tool":
        checked |= {name: message[name] for name in ("tool_call_id", "name") if name in message}
        if not all(isinstance(value, str) for value in checked.values()):
            raise PromptError("a tool's message names its call and its function as texts")
    return checked


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Return calls of functions as templates want them: with arguments that are no text."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise PromptError(f"a call in a message needs a function with a name, got {shown(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise PromptError(f"the arguments of a call of {shown(name)} are not JSON") from None
        if is_deep(arguments):
            raise PromptError(f"the arguments of a call of {shown(name)} are nested too deeply")
        function = {"name": name, "arguments": arguments}
        found.append({"id": str(call.get("id") or "0"), "type": "function", "function": function})
    return found


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


def is_deep(value: Any, limit: int = 100) -> bool:
    """Tell whether a JSON value is nested deeper than what goes through it can follow."""
    if not limit:
        return True
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(is_deep(each, limit - 1) for each in inner)


def split(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Return what is to be answered, and how the answer begins: "" if it is not begun."""
    if messages and messages[-1]["role"] == "assistant":
        return list(messages[:-1]), messages[-1]["content"]
    return list(messages), ""


def with_preference(
    messages: Sequence[Mapping[str, Any]], preference: str | None, placement: Placement
) -> list[dict[str, Any]]:
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
    parts = [message["role"], message["content"]]
    parts += [json.dumps(message[name]) for name in ("tool_calls", "tool_call_id") if name in message]
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)


def reshaped(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
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


def _merged(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for message in messages:
        is_plain = message["role"] != "tool" and not message.get("tool_calls")
        if merged and merged[-1]["role"] == message["role"] and is_plain:
            merged[-1] = {**merged[-1], "content": _joined(merged[-1], message)}
        else:
            merged.append(message)
    return merged


def _joined(*messages: Mapping[str, Any]) -> str:
    return "\n\n".join(each["content"] for each in messages if each["content"].strip())


def _fold(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    folded: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
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


def _fold_later(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    is_first = bool(messages) and messages[0]["role"] == "system"
    return [*messages[:is_first], *_fold(messages[is_first:])]


def _opened(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first = next((i for i, each in enumerate(messages) if each["role"] != "system"), len(messages))
    if first == len(messages) or messages[first]["role"] == "user":
        return list(messages)
    return [*messages[:first], {"role": "user", "content": ""}, *messages[first:]]
