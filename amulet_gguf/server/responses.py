"""OpenAI's Responses: nothing is kept, so that every request brings the whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from amulet_gguf.engine.answer import Answer, FinishReason, Kind, Piece, Usage
from amulet_gguf.prompts.messages import THOUGHT
from amulet_gguf.server.asked import Asked, usual
from amulet_gguf.server.desk import (
    Desk,
    effort_of,
    messages_of,
    named_event,
    schema_of,
    text_in,
    unusable,
)
from amulet_gguf.server.errors import RequestError, as_json
from amulet_gguf.server.schema import Open, Whole
from amulet_gguf.settings import Settings
from amulet_gguf.stream import AnswerStream

PATHS: Final = ("/v1/responses", "/v1/responses/input_tokens")
_TEXTS: Final = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")


def routes(desk: Desk) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        asked = body.asked()
        name, settings = desk.settings_for(asked)
        reply = ResponsesReply(name, body.echo(settings))
        return await desk.answer(asked, settings, reply, request, bool(body.stream))

    @router.post("/v1/responses/input_tokens")
    async def count(body: ResponsesRequest) -> Response:
        n_tokens = await desk.count(body.asked())
        return as_json({"object": "response.input_tokens", "input_tokens": n_tokens})

    return router


class TextOptions(Open):
    format: dict[str, Any] | None = None


class Reasoning(Open):
    effort: str | None = None


class ResponsesRequest(Open):
    """POST /v1/responses; settings stand beside what is named here."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    profile: str | None = None
    # What would need something that is kept:
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    # What changes nothing here:
    stream_options: Any = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: Literal[0] | None = None
    max_tool_calls: Any = None

    def asked(self) -> Asked:
        """Return what is asked for.

        Raises:
            RequestError: a field that is not known or not possible here.
        """
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                message = f"{name}: this server keeps no responses; send the whole conversation as input"
                raise RequestError(400, message, code="unsupported_parameter", param=name)
        if "message.output_text.logprobs" in (self.include or ()):
            message = "logprobs are told by /v1/chat/completions alone"
            raise RequestError(400, message, code="unsupported_parameter", param="include")
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return Asked(
            self._settings(),
            messages=messages_of([*messages, *_messages(self.input)]),
            model=self.model,
            profile=self.profile,
            tools=[_function(tool) for tool in self.tools or ()],
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )

    def _settings(self) -> dict[str, Any]:
        changes = self.changes()
        if self.max_output_tokens is not None:
            changes["max_tokens"] = most = usual("max_tokens", self.max_output_tokens)
            changes.setdefault("think_tokens", most)
        if self.reasoning is not None:
            changes = {**effort_of(self.reasoning.effort, "reasoning.effort"), **changes}
        schema = None if self.text is None else schema_of(self.text.format, "text.format")
        return changes if schema is None else {**changes, "schema": schema}

    def echo(self, settings: Settings) -> dict[str, Any]:
        """Return what a response repeats of its request."""
        text = {"format": {"type": "text"}}
        if self.text is not None and self.text.format is not None:
            text = {"format": self.text.format}
        effort = None if self.reasoning is None else self.reasoning.effort
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": settings.max_tokens,
            "metadata": (self.model_extra or {}).get("metadata") or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": settings.temperature,
            "text": text,
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_p": settings.top_p,
            "truncation": "disabled",
        }


def _messages(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of an input, in the form of chat completions.

    Raises:
        RequestError: an item that is not known here.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    message: dict[str, Any]
    thought = ""
    for item in given:
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought += text_in(item.get("content") or item.get("summary") or "", _TEXTS, "input")
            continue
        if kind == "function_call_output":
            output = text_in(item.get("output"), _TEXTS, "input")
            call = item.get("call_id")
            messages.append({"role": "tool", "tool_call_id": call, "content": output})
            continue
        if kind == "function_call":
            is_gone_on_with = messages and messages[-1]["role"] == "assistant" and not thought
            message = messages.pop() if is_gone_on_with else {"role": "assistant", "content": ""}
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            message["tool_calls"] = [*message.get("tool_calls", ()), call]
        elif kind == "message":
            said = text_in(item.get("content"), _TEXTS, "input")
            message = {"role": item.get("role"), "content": said}
        else:
            what = repr(kind)[:60]
            raise unusable(f"an item of type {what} is not supported: nothing is kept here", "input")
        if thought and message["role"] == "assistant":
            message[THOUGHT] = thought
        thought = ""
        messages.append(message)
    return messages


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool in the form of chat completions.

    Raises:
        RequestError: it is not a function.
    """
    if tool.get("type") != "function":
        raise unusable("tools: functions alone are supported", "tools")
    names = ("name", "description", "parameters")
    return {"type": "function", "function": {name: tool[name] for name in names if name in tool}}


def _choice(choice: str | Mapping[str, Any] | None) -> str:
    """Return `Asked.tool_choice`.

    Raises:
        RequestError: it is to be something else than a function.
    """
    if isinstance(choice, Mapping):
        choice = choice.get("name")
        if not isinstance(choice, str):
            raise unusable("tool_choice must name a function", "tool_choice")
    return choice or "auto"


_REASONING: Final = "reasoning"
_MESSAGE: Final = "message"
_PARTS: Final = {_REASONING: "reasoning_text", _MESSAGE: "output_text"}


def _item(id: str, kind: str, text: str | None, status: str) -> dict[str, Any]:
    """Return an item of a response's output; without a text, one that has just begun."""
    content = [] if text is None else [_part(kind, text)]
    if kind == _REASONING:
        return {"id": id, "type": kind, "summary": [], "content": content, "status": status}
    return {"id": id, "type": kind, "role": "assistant", "status": status, "content": content}


def _part(kind: str, text: str) -> dict[str, Any]:
    part = {"type": _PARTS[kind], "text": text}
    return part if kind == _REASONING else {**part, "annotations": [], "logprobs": []}


class ResponsesReply:
    """The response to one request; a `Reply`."""

    media_type = "text/event-stream"

    def __init__(self, model: str, echo: Mapping[str, Any]) -> None:
        """Begin a response.

        Args:
            echo: what it repeats of its request.
        """
        self.id = f"resp_{secrets.token_hex(24)}"
        self._model = model
        self._echo = echo
        self._created = int(time.time())
        self._n_events = 0
        self._output: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the item being written
        self._item_id = ""
        self._text = ""
        self._reason: FinishReason | None = None

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        answer = answers[0]
        texts = [(_REASONING, answer.thought)] if answer.thought else []
        for kind, text in [*texts, (_MESSAGE, answer.text)]:
            status = _status(answer.finish_reason) if kind == _MESSAGE else "completed"
            self._output.append(_item(_new_id(kind), kind, text, status))
        return self._response(_status(answer.finish_reason), answer.usage)

    def opening(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def events(self, index: int, piece: Piece) -> Iterable[bytes]:
        if piece.text:
            kind = _kind_of(piece.kind)
            if kind != self._kind:
                yield from self._end_item("completed")
                yield from self._begin_item(kind)
            self._text += piece.text
            yield self._part_event("delta", delta=piece.text)
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason

    def closing(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        status = _status(self._reason)
        if self._kind != _MESSAGE:
            yield from self._end_item("completed")
            yield from self._begin_item(_MESSAGE)  # an empty answer is one
        yield from self._end_item(status)
        response = self._response(status, streams[0].usage)
        yield self._event(f"response.{status}", response=response)

    def failed(self, error: RequestError) -> Iterable[bytes]:
        yield from self._end_item("incomplete")
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response=response)

    def _begin_item(self, kind: str) -> Iterable[bytes]:
        self._kind, self._item_id, self._text = kind, _new_id(kind), ""
        item = _item(self._item_id, kind, None, "in_progress")
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)
        yield self._event("response.content_part.added", **self._place, part=_part(kind, ""))

    def _end_item(self, status: str) -> Iterable[bytes]:
        if self._kind is None:
            return
        yield self._part_event("done", text=self._text)
        yield self._event(
            "response.content_part.done", **self._place, part=_part(self._kind, self._text)
        )
        item = _item(self._item_id, self._kind, self._text, status)
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._kind = None

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": len(self._output), "content_index": 0}

    def _part_event(self, what: str, **more: Any) -> bytes:
        """Return an event of the text being written."""
        assert self._kind is not None
        probabilities: dict[str, Any] = {} if self._kind == _REASONING else {"logprobs": []}
        name = f"response.{_PARTS[self._kind]}.{what}"
        return self._event(name, **self._place, **more, **probabilities)

    def _event(self, kind: str, **content: Any) -> bytes:
        number = self._n_events
        self._n_events += 1
        return named_event({"type": kind, "sequence_number": number, **content})

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "model": self._model,
            "output": list(self._output),
            "usage": None if usage is None else _counts(usage),
            **self._echo,
        }


def _new_id(kind: str) -> str:
    return ("rs_" if kind == _REASONING else "msg_") + secrets.token_hex(24)


def _kind_of(kind: Kind) -> str:
    return _REASONING if kind == "thought" else _MESSAGE


def _status(reason: FinishReason | None) -> str:
    return "incomplete" if reason == "length" else "completed"


def _counts(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
