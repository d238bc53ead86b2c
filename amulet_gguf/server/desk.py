"""Where the dialects meet: what they ask for is answered, counted and looked up here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from amulet_gguf.amulet import Amulet
from amulet_gguf.server.answering import Answering, Reply
from amulet_gguf.server.asked import Asked
from amulet_gguf.server.errors import RequestError
from amulet_gguf.server.replies import as_line
from amulet_gguf.server.schema import ChatMessage, conversation
from amulet_gguf.server.schemas import held
from amulet_gguf.server.served import Served
from amulet_gguf.settings import Settings

T = TypeVar("T")


class Desk:
    """What is served, for the endpoints of all dialects."""

    def __init__(self, served: Callable[[], Served], answering: Answering) -> None:
        """Serve.

        Args:
            served: tells what is served now: its profiles change.
        """
        self._served = served
        self._answering = answering

    @property
    def served(self) -> Served:
        return self._served()

    @property
    def amulet(self) -> Amulet:
        """To be looked at only.

        Raises:
            ClosedError: the server is closing.
        """
        return self.served.service.wait_ready()

    def settings_for(self, asked: Asked) -> tuple[str, Settings]:
        """Return the name of the model to report, and the settings of a request.

        Raises:
            RequestError, SettingError: a name or a value that is not possible.
        """
        return self.served.named(asked.model)[0], self.served.settings_for(asked)

    async def answer(
        self, asked: Asked, settings: Settings, reply: Reply, request: Request, is_streamed: bool
    ) -> Response:
        """Return the response to a request; errors as `Answering.answer`."""
        return await self._answering.answer(asked, settings, reply, request, is_streamed=is_streamed)

    async def look(self, make: Callable[[Amulet], T]) -> T:
        """Ask something of the vocabulary or the chat template.

        Raises:
            QueueFullError, ClosedError: nobody can look.
            Exception: what `make` raises.
        """
        return await asyncio.wrap_future(self.served.service.look(make))

    async def prompt(self, asked: Asked, settings: Settings) -> str:
        """Return a conversation as the model's template renders it, without preferences; errors as
        `look`."""

        def rendered(amulet: Amulet) -> str:
            planner = amulet.planner
            base = planner.base(None, asked.messages, settings)
            began = planner.template.beginnings.of(base)
            return planner.transcripts(settings, asked.tools).template.encode(base, None, began).prompt

        return await self.look(rendered)

    async def count(self, asked: Asked) -> int:
        """Return the tokens of a conversation's prompt, as an answer's `usage` would have them.

        Raises:
            RequestError, AmuletError: it is not possible.
        """
        _, settings = self.settings_for(asked)

        def counted(amulet: Amulet) -> int:
            request = amulet.planner.request(
                None, asked.messages, settings, reuse=True, tools=asked.tools
            )
            return max(len(branch) for branch in request.branches)

        return await self.look(counted)


def messages_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages that were translated into OpenAI's form as those of a chat request.

    Raises:
        RequestError: one of them is not possible.
    """
    try:
        return conversation([ChatMessage.model_validate(message) for message in messages])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])[:100]
        raise unusable(f"messages: {where}: {first['msg']}") from None


def text_in(content: Any, kinds: Sequence[str], where: str) -> str:
    """Return the text of a content: a text, or a list of parts of certain kinds.

    Raises:
        RequestError: it holds something else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise unusable("the content of a message must be a text or a list of parts", where)
    return "".join(text_of_part(part, kinds, where) for part in content)


def text_of_part(part: Any, kinds: Sequence[str], where: str) -> str:
    """Return the text of one part; errors as `text_in`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise unusable("a part of a content must be an object with a type", where)
    text = part.get(kind if kind in ("refusal", "thinking") else "text")
    if kind in kinds and isinstance(text, str):
        return text
    if "image" in kind:
        raise unusable("image input is not supported by this server", where)
    raise unusable(f"a part of type {kind[:40]!r} is not supported here", where)


def unusable(message: str, where: str = "messages") -> RequestError:
    """Return the error for a field that holds what it cannot."""
    return RequestError(400, message, code="invalid_value", param=where)


def effort_of(effort: Any, where: str) -> dict[str, Any]:
    """Return the settings for how much to think, in the words of several programs.

    Raises:
        RequestError: it is none of them.
    """
    if effort is None:
        return {}
    if effort in ("none", "minimal"):
        return {"think": False}
    if effort in ("low", "medium", "high"):
        return {"think_effort": effort}
    if effort in ("xhigh", "max"):
        return {"think_effort": "high"}
    raise unusable(f"{where} must be none, minimal, low, medium or high", where)


def schema_of(form: Any, where: str) -> Any:
    """Return the JSON schema that a description of a format asks for, or None.

    Raises:
        RequestError: it is of no known kind, or has none.
    """
    kind = form.get("type") if isinstance(form, Mapping) else None
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise unusable(f"{where}.type must be text, json_object or json_schema", where)
    if form.get("schema") is None:
        raise unusable(f"{where}.schema is missing", f"{where}.schema")
    schema = form["schema"]
    return schema if form.get("strict") is True else held(schema, where, is_strict=False)


def arguments_of(call: str) -> Any:
    """Return the arguments of a call as a value; none of one that was cut off."""
    try:
        return json.loads(call)
    except ValueError:
        return {}


def named_event(content: Mapping[str, Any]) -> bytes:
    """Return a server-sent event that is called as its content's type."""
    return f"event: {content['type']}\ndata: {as_line(content)}\n\n".encode()
