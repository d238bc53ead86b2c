"""OpenAI's Responses: nothing is kept, so that every request brings the whole conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from amulet_gguf.prompts.messages import THOUGHT
from amulet_gguf.server.asked import Asked, tools_in, usual
from amulet_gguf.server.desk import (
    Desk,
    effort_of,
    messages_of,
    schema_of,
    text_in,
    unusable,
)
from amulet_gguf.server.errors import RequestError, as_json
from amulet_gguf.server.responding import ResponsesReply
from amulet_gguf.server.schema import Open, Whole
from amulet_gguf.settings import Settings

PATHS: Final = ("/v1/responses", "/v1/responses/input_tokens")
_TEXTS: Final = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")


def routes(desk: Desk) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        asked = body.asked()
        name, settings = desk.settings_for(asked)
        reply = ResponsesReply(name, body.echo(settings), bool(body.timings_per_token))
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
    # llama.cpp's:
    return_progress: bool | None = None
    timings_per_token: bool | None = None
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
            tools=tools_in(
                [_function(tool) for tool in self.tools or ()],
                _choice(self.tool_choice),
                self.parallel_tool_calls,
            ),
            has_progress=bool(self.return_progress),
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
