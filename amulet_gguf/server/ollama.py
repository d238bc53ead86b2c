"""ollama's API, for programs that know no other; its defaults of sampling are not taken over."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import functools
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.answer import Answer, Call, FinishReason, Piece, Timings, Usage, calls_in
from amulet_gguf.errors import AmuletError
from amulet_gguf.llama.gguf import read_header, size
from amulet_gguf.prompts.messages import THOUGHT
from amulet_gguf.server.asked import Asked, changes_in, tools_in
from amulet_gguf.server.desk import Desk, arguments_of, effort_of, messages_of, unusable
from amulet_gguf.server.errors import RequestError, as_json
from amulet_gguf.server.schema import Open
from amulet_gguf.stream import AnswerStream

PATHS: Final = ("/api/chat", "/api/generate", "/api/tags", "/api/show", "/api/version", "/api/ps")
#: Of the ollama whose API this is: some clients refuse older ones.
_VERSION: Final = "0.12.6"
_NEVER: Final = "9999-12-31T23:59:59Z"
_REASONS: Final = {"stop": "stop", "length": "length", "cancelled": "stop"}


def routes(desk: Desk) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/api/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await write(body, request, not body.messages)

    @router.post("/api/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        return await write(body, request, not body.prompt)

    async def write(body: ChatBody | GenerateBody, request: Request, is_to_load: bool) -> Response:
        asked = body.asked()
        if isinstance(body, GenerateBody) and body.raw and body.prompt:
            text = body.prompt
            tokens = await desk.look(lambda amulet: amulet.planner.template.encode_markup(text).tolist())
            asked = dataclasses.replace(asked, messages=None, texts=[tokens])
        name, settings = desk.settings_for(asked)
        reply = OllamaReply(_tagged(name), isinstance(body, ChatBody))
        if is_to_load:  # and here the model always is
            return as_json(reply.loaded("unload" if body.keep_alive in (0, "0") else "load"))
        return await desk.answer(asked, settings, reply, request, body.stream is not False)

    @router.get("/api/tags")
    async def tags() -> Response:
        served = desk.served
        names = [_tagged(served.name), *(f"{served.name}:{suffix}" for suffix in served.suffixes)]
        about = await asyncio.to_thread(_about, desk.amulet)
        return as_json({"models": [_named(name, about) for name in names]})

    @router.get("/api/ps")
    async def running() -> Response:
        amulet = desk.amulet
        about = await asyncio.to_thread(_about, amulet)
        in_gpu = round(about["size"] * amulet.model.share_on_gpu)
        more = {"expires_at": _NEVER, "size_vram": in_gpu, "context_length": amulet.engine.n_ctx}
        return as_json({"models": [{**_named(_tagged(desk.served.name), about), **more}]})

    @router.post("/api/show")
    async def show(body: ShowBody) -> Response:
        asked = Asked({}, model=body.model or body.name)
        name, settings = desk.settings_for(asked)
        amulet = desk.amulet
        about = await asyncio.to_thread(_about, amulet)
        thinks = amulet.planner.template.marks is not None
        shown = {
            "modelfile": f"FROM {name}",
            "parameters": f"num_ctx {amulet.engine.n_ctx}\ntemperature {settings.temperature:g}",
            "template": amulet.model.chat_template or "",
            "details": about["details"],
            "model_info": _info(amulet),
            "capabilities": ["completion", "tools", *(["thinking"] if thinks else [])],
            "modified_at": about["modified_at"],
        }
        return as_json(shown)

    @router.get("/api/version")
    async def version() -> Response:
        return as_json({"version": _VERSION})

    return router


class _Body(Open):
    """What both ways to write have; settings of this project may stand in `options` or beside it."""

    model: str
    options: dict[str, Any] | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    stream: bool | None = None
    keep_alive: Any = None
    profile: str | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None

    def _settings(self) -> dict[str, Any]:
        """Return the settings that differ.

        Raises:
            RequestError: a field that is not known or not possible here.
        """
        changes = {**changes_in(self.options or {}), **self.changes()}
        if isinstance(self.think, bool):
            changes["think"] = self.think
        else:
            changes.update(effort_of(self.think, "think"))
        if self.format == "json":
            changes["schema"] = {"type": "object"}
        elif isinstance(self.format, dict):
            changes["schema"] = self.format
        elif self.format:
            raise unusable('format must be "json" or a JSON schema', "format")
        return changes


class ChatBody(_Body):
    """POST /api/chat."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None

    def asked(self) -> Asked:
        """Return what is asked for.

        Raises:
            RequestError: a field that is not known or not possible here.
        """
        return Asked(
            self._settings(),
            messages=messages_of(_translated(self.messages or ())),
            model=self.model,
            profile=self.profile,
            tools=tools_in(self.tools, None, None),
        )


class GenerateBody(_Body):
    """POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None

    def asked(self) -> Asked:
        """Return what is asked for; errors as `ChatBody.asked`."""
        messages = [{"role": "user", "content": self.prompt or ""}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return Asked(self._settings(), messages=messages, model=self.model, profile=self.profile)


class ShowBody(Open):
    """POST /api/show."""

    model: str | None = None
    name: str | None = None


def _translated(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in the form of chat completions: calls of tools get ids, in their order.

    Raises:
        RequestError: what is in one is not known here.
    """
    found: list[dict[str, Any]] = []
    n_calls = n_results = 0
    for message in messages:
        if message.get("images"):
            raise unusable("image input is not supported by this server")
        said: dict[str, Any] = {"role": message.get("role"), "content": message.get("content")}
        if isinstance(message.get("thinking"), str):
            said[THOUGHT] = message["thinking"]
        if message.get("role") == "tool":
            said["tool_call_id"] = f"call_{n_results}"
            n_results += 1
        calls = message.get("tool_calls") or ()
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping):
                raise unusable("a call of a tool must have a function")
            arguments = json.dumps(function.get("arguments") or {})
            function = {"name": function.get("name"), "arguments": arguments}
            made = {"id": f"call_{n_calls}", "type": "function", "function": function}
            said.setdefault("tool_calls", []).append(made)
            n_calls += 1
        found.append(said)
    return found


class OllamaReply:
    """The answer to one request, as lines of JSON; a `Reply`."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, is_chat: bool) -> None:
        self.id = f"ollama-{secrets.token_hex(16)}"
        self._model = model
        self._is_chat = is_chat
        self._reason: FinishReason = "stop"
        self._calls: list[Piece] = []

    def loaded(self, reason: str) -> dict[str, Any]:
        """Return what is answered to a request that says nothing."""
        return {**self._said(""), "done": True, "done_reason": reason}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        answer = answers[0]
        said = self._said(answer.text, answer.thought, answer.calls)
        return {**said, **_end(answer.finish_reason, answer.usage, answer.timings)}

    def opening(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        return ()

    def progress(self, n_read: int, n_prompt: int) -> Iterable[bytes]:
        return ()

    def events(self, index: int, piece: Piece) -> Iterable[bytes]:
        if piece.call is not None:
            self._calls.append(piece)  # they are sent whole
        if piece.text:
            is_thought = piece.kind == "thought"
            said = self._said("", piece.text) if is_thought else self._said(piece.text)
            yield _line({**said, "done": False})
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason

    def closing(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        if self._calls:
            yield _line({**self._said("", "", calls_in(self._calls)), "done": False})
        end = _end(self._reason, streams[0].usage, streams[0].timings)
        yield _line({**self._said(""), **end})

    def failed(self, error: RequestError) -> Iterable[bytes]:
        yield _line(error.body_for(PATHS[0]))

    def _said(self, text: str, thought: str = "", calls: Sequence[Call] = ()) -> dict[str, Any]:
        head = {"model": self._model, "created_at": _time(datetime.datetime.now(datetime.timezone.utc))}
        thinking: dict[str, Any] = {"thinking": thought} if thought else {}
        if calls:
            thinking["tool_calls"] = [
                {"function": {"name": call.name, "arguments": arguments_of(call.arguments)}}
                for call in calls
            ]
        if self._is_chat:
            return {**head, "message": {"role": "assistant", "content": text, **thinking}}
        return {**head, "response": text, **thinking}


def _end(reason: FinishReason, usage: Usage, timings: Timings) -> dict[str, Any]:
    """Return what the last line says, with times in nanoseconds."""
    queue, prefill, decode = (
        round(1e9 * seconds) for seconds in (timings.queue, timings.prefill, timings.decode)
    )
    return {
        "done": True,
        "done_reason": _REASONS[reason],
        "total_duration": queue + prefill + decode,
        "load_duration": queue,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": prefill,
        "eval_count": usage.completion_tokens,
        "eval_duration": decode,
    }


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _time(moment: datetime.datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _tagged(name: str) -> str:
    """Return a name as ollama has all of them: with something behind a colon."""
    return name if ":" in name else f"{name}:latest"


def _named(name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    # Not of the file's content, which would have to be read; it only tells models apart.
    digest = hashlib.sha256(f"{name} {about['size']}".encode()).hexdigest()
    return {"name": name, "model": name, "digest": digest, **about}


def _about(amulet: Amulet) -> dict[str, Any]:
    model = amulet.model
    size, modified, quantization = _file(model.path)
    family = model.metadata("general.architecture") or "unknown"
    n = model.n_parameters
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M",
        "quantization_level": quantization,
    }
    return {"size": size, "modified_at": modified, "details": details}


@functools.lru_cache(maxsize=8)
def _file(path: Path) -> tuple[int, str, str]:
    """Return the size of a model, when it was made, and its quantization."""
    try:
        made = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
        return size(path), _time(made), read_header(path).quantization
    except (OSError, AmuletError):  # it was loaded, and is no longer there
        return 0, "1970-01-01T00:00:00Z", "unknown"


def _info(amulet: Amulet) -> dict[str, Any]:
    model = amulet.model
    family = model.metadata("general.architecture") or "unknown"
    names = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    found = {f"{family}.{name}": model.metadata(f"{family}.{name}") for name in names}
    numbers = {name: int(text) for name, text in found.items() if text is not None and text.isdigit()}
    return {
        "general.architecture": family,
        "general.parameter_count": model.n_parameters,
        f"{family}.context_length": model.n_ctx_train,
        **numbers,
    }
