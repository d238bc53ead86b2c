"""Anthropic's Messages."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from amulet_gguf.engine.answer import Answer, FinishReason, Kind, Piece, Usage
from amulet_gguf.prompts.messages import THOUGHT
from amulet_gguf.server.asked import Asked, tools_in, usual
from amulet_gguf.server.desk import (
    Desk,
    arguments_of,
    effort_of,
    messages_of,
    named_event,
    schema_of,
    text_in,
    text_of_part,
    unusable,
)
from amulet_gguf.server.errors import RequestError, as_json
from amulet_gguf.server.replies import call_id
from amulet_gguf.server.schema import Open, Whole
from amulet_gguf.server.streaming import EVENTS
from amulet_gguf.stream import AnswerStream

PATHS: Final = ("/v1/messages", "/v1/messages/count_tokens")
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


def routes(desk: Desk) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/v1/messages")
    async def write(body: MessagesRequest, request: Request) -> Response:
        asked = body.asked()
        name, settings = desk.settings_for(asked)
        return await desk.answer(asked, settings, MessagesReply(name), request, bool(body.stream))

    @router.post("/v1/messages/count_tokens")
    async def count(body: CountRequest) -> Response:
        return as_json({"input_tokens": await desk.count(body.asked())})

    return router


class CountRequest(Open):
    """POST /v1/messages/count_tokens; settings stand beside what is named here."""

    messages: list[dict[str, Any]]
    model: str | None = None
    max_tokens: Whole | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    profile: str | None = None
    # What changes nothing here:
    cache_control: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None

    def asked(self) -> Asked:
        """Return what is asked for.

        Raises:
            RequestError: a field that is not known or not possible here.
        """
        system = "" if self.system is None else text_in(self.system, ("text",), "system")
        messages = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            messages += _translated(message)
        choice = self.tool_choice or {"type": "auto"}
        kind = str(choice.get("type"))
        is_named = kind == "tool"
        return Asked(
            self._settings(),
            messages=messages_of(messages),
            model=self.model,
            profile=self.profile,
            tools=tools_in(
                [_function(tool) for tool in self.tools or ()],
                str(choice.get("name")) if is_named else _CHOICES.get(kind, "auto"),
                choice.get("disable_parallel_tool_use") is not True,
            ),
        )

    def _settings(self) -> dict[str, Any]:
        changes = self.changes()
        if self.stop_sequences is not None:
            changes["stop"] = usual("stop", self.stop_sequences)
        if self.max_tokens is not None:
            changes["max_tokens"] = most = usual("max_tokens", self.max_tokens)
            changes.setdefault("think_tokens", most)
        config = self.output_config or {}
        changes = {**effort_of(config.get("effort"), "output_config.effort"), **changes}
        schema = schema_of(config.get("format") or self.output_format, "output_config.format")
        if schema is not None:
            changes["schema"] = schema
        thinking = self.thinking or {}
        kind = thinking.get("type")
        if kind in ("enabled", "adaptive"):
            changes["think"] = True
            if thinking.get("budget_tokens") is not None:
                changes["think_tokens"] = usual("think_tokens", thinking["budget_tokens"])
        elif kind == "disabled":
            changes["think"] = False
        elif kind is not None:
            raise unusable("thinking.type must be enabled, adaptive or disabled", "thinking")
        return changes


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Whole


def _translated(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a message in the form of chat completions; results of tools are messages of their own.

    Raises:
        RequestError: a block that is not known here.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return [{"role": message.get("role"), "content": text_in(content, (), "messages")}]
    found: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    text = thought = ""
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            result = text_in(block.get("content") or "", ("text",), "messages")
            found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input"))
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thought += text_of_part(block, ("thinking",), "messages")
        elif kind != "redacted_thinking":
            text += text_of_part(block, ("text",), "messages")
    if text or calls or not found:
        said: dict[str, Any] = {"role": message.get("role"), "content": text}
        if calls:
            said["tool_calls"] = calls
        if thought:
            said[THOUGHT] = thought
        found.append(said)
    return found


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {name: tool[name] for name in ("name", "description") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema", {})}}


class MessagesReply:
    """The message that answers one request; a `Reply`."""

    media_type = EVENTS

    def __init__(self, model: str) -> None:
        self.id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._n_blocks = 0  # that were begun
        self._kind: Kind | None = None  # of the block being written
        self._last: Piece | None = None
        self._has_called = False

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        answer = answers[0]
        blocks = [_block("thought", answer.thought)] if answer.thought else []
        calls = answer.calls
        if answer.text.strip() or not calls:
            blocks.append(_block("answer", answer.text))
        blocks += [_call(call.name, arguments_of(call.arguments)) for call in calls]
        last = answer.pieces[-1] if answer.pieces else None
        return self._message(answer.usage, blocks, last, has_called=bool(calls))

    def opening(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        message = self._message(streams[0].usage, [], None)
        yield named_event({"type": "message_start", "message": message})

    def progress(self, n_read: int, n_prompt: int) -> Iterable[bytes]:
        return ()

    def events(self, index: int, piece: Piece) -> Iterable[bytes]:
        if piece.call is not None:
            if piece.call.name is not None:
                yield from self._end_block()
                yield from self._begin_block("call", _call(piece.call.name, {}))
            if piece.call.arguments:
                part = piece.call.arguments
                yield self._delta({"type": "input_json_delta", "partial_json": part})
        elif piece.text and (self._kind != "call" or piece.text.strip()):
            if piece.kind != self._kind:
                yield from self._end_block()
                yield from self._begin_block(piece.kind)
            field = "thinking" if piece.kind == "thought" else "text"
            yield self._delta({"type": f"{field}_delta", field: piece.text})
        self._last = piece

    def closing(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        if self._kind != "answer" and not self._has_called:
            yield from self._end_block()
            yield from self._begin_block("answer")  # an empty answer has a block
        yield from self._end_block()
        delta, usage = _end(self._last, self._has_called), _counts(streams[0].usage)
        yield named_event({"type": "message_delta", "delta": delta, "usage": usage})
        yield named_event({"type": "message_stop"})

    def failed(self, error: RequestError) -> Iterable[bytes]:
        yield named_event(error.body_for(PATHS[0]))

    def _begin_block(self, kind: Kind, block: Mapping[str, Any] | None = None) -> Iterable[bytes]:
        self._kind = kind
        self._has_called |= kind == "call"
        block = block or _block(kind, "")
        index, self._n_blocks = self._n_blocks, self._n_blocks + 1
        yield named_event({"type": "content_block_start", "index": index, "content_block": block})

    def _end_block(self) -> Iterable[bytes]:
        if self._kind is None:
            return
        if self._kind == "thought":  # clients wait for it, and send it back
            yield self._delta({"type": "signature_delta", "signature": ""})
        yield named_event({"type": "content_block_stop", "index": self._n_blocks - 1})
        self._kind = None

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        index = self._n_blocks - 1
        return named_event({"type": "content_block_delta", "index": index, "delta": delta})

    def _message(
        self,
        usage: Usage,
        content: Sequence[Mapping[str, Any]],
        last: Piece | None,
        *,
        has_called: bool = False,
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **_end(last, has_called),
            "usage": _counts(usage),
        }


def _block(kind: Kind, text: str) -> dict[str, Any]:
    if kind == "thought":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{call_id()}", "name": name, "input": arguments}


def _end(last: Piece | None, has_called: bool) -> dict[str, Any]:
    """Return why an answer ended, where it has."""
    reason: FinishReason | None = None if last is None else last.finish_reason
    if last is None or reason is None:
        return {"stop_reason": None, "stop_sequence": None}
    if reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if has_called:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    is_stop = last.stopped_by is not None
    return {"stop_reason": "stop_sequence" if is_stop else "end_turn", "stop_sequence": last.stopped_by}


def _counts(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
