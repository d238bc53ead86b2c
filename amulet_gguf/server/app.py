"""The endpoints."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from amulet_gguf.engine.answer import Answer, Piece
from amulet_gguf.errors import AmuletError
from amulet_gguf.home.config import Config, load_config
from amulet_gguf.preferences import MAX_PREFERENCES, PRESETS
from amulet_gguf.server.errors import RequestError, as_json
from amulet_gguf.server.guard import Access, Guard
from amulet_gguf.server.metrics import Metrics
from amulet_gguf.server.replies import DONE, Reply, event
from amulet_gguf.server.schema import (
    MAX_ANSWERS,
    Adjustment,
    ChatRequest,
    CompletionRequest,
    conversation,
)
from amulet_gguf.server.tastes import Tastes
from amulet_gguf.service.service import AmuletService
from amulet_gguf.service.stream import ServiceStream
from amulet_gguf.settings import Settings

#: The name of whatever model is served.
ALIAS: Final = "amulet"
_SEND_SECONDS: Final = 60.0  # for a client that does not read


@dataclass(frozen=True)
class Served:
    """What is served, and within which limits.

    Attributes:
        service: with its model loaded.
        name: of the model.
        settings: where requests start from.
        config: profiles that requests may name.
        max_tokens: of one answer.
        n_sequences: branches that one answer may have at most.
    """

    service: AmuletService
    name: str
    settings: Settings = field(default_factory=Settings)
    config: Config | None = None
    max_tokens: int = 4096
    n_sequences: int = 8

    @property
    def profiles(self) -> Sequence[str]:
        return [] if self.config is None else list(self.config.profiles)

    @property
    def suffixes(self) -> Sequence[str]:
        """What may follow the name of the model after a colon."""
        return list(dict.fromkeys([*self.profiles, *PRESETS]))

    def start(self, model: str | None, profile: str | None) -> Settings:
        """Return what a request starts from.

        Args:
            model: NAME or NAME:SUFFIX, or None.
            profile: of the configuration, or None; goes before the suffix.

        Raises:
            RequestError: there is no such model or profile.
        """
        suffix = self._suffix(model) if model else None
        name = profile or suffix
        if name is None:
            return self.settings
        if self.config is not None and name in self.config.profiles:
            return self.config.settings(name, self.settings)
        if name != suffix:
            raise RequestError(400, f"there is no profile {name[:64]!r}", param="profile")
        return self.settings.replace(prefer=name)

    def _suffix(self, model: str) -> str | None:
        asked = model.lower()
        if self._is_name(asked):
            return None
        base, _, suffix = model.rpartition(":")
        if base and self._is_name(base.lower()) and suffix in self.suffixes:
            return suffix
        message = f"there is no model {model[:100]!r} here: {self.name} is served (GET /v1/models)"
        raise RequestError(404, message, code="model_not_found", param="model")

    def _is_name(self, asked: str) -> bool:
        return asked == ALIAS or self.name.lower().startswith(asked)


def create_app(served: Served, access: Access | None = None) -> ASGIApp:
    """Return the server as an ASGI app, guarded."""
    access = access or Access()
    api = _Api(served)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/")(api.page)
    app.get("/health")(api.health)
    app.get("/metrics")(api.prometheus)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{name:path}")(api.model)
    app.post("/v1/chat/completions")(api.chat)
    app.patch("/v1/chat/completions/{id}")(api.adjust)
    app.post("/v1/completions")(api.complete)
    app.get("/v1/tastes/{name}")(api.tastes.show)
    app.post("/v1/tastes/{name}")(api.tastes.choose)
    app.delete("/v1/tastes/{name}")(api.tastes.forget)

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> Response:
        return error.response

    @app.exception_handler(AmuletError)
    async def on_amulet_error(_: Request, error: AmuletError) -> Response:
        return RequestError.of(error).response

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response

    @app.exception_handler(HTTPException)
    async def on_http_exception(_: Request, error: HTTPException) -> Response:
        return RequestError(error.status_code, str(error.detail)).response

    @app.exception_handler(Exception)  # the guard logs it
    async def on_other(_: Request, __: Exception) -> Response:
        return RequestError(500, "the server failed at this request").response

    inner: ASGIApp = app
    if access.allow_origins:
        inner = CORSMiddleware(
            app,
            allow_origins=list(access.allow_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    return Guard(inner, access, api.metrics.count_request)


def _invalid(error: RequestValidationError) -> RequestError:
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"] if step != "body")[:100]
    if first["type"] == "json_invalid":
        return RequestError(400, "the body is not valid JSON", code="invalid_json")
    what = first["msg"][0].lower() + first["msg"][1:]
    return RequestError(400, f"{where or 'the body'}: {what}", code="invalid_type", param=where or None)


class _Api:
    def __init__(self, served: Served) -> None:
        self._served = served
        self._service = served.service
        self._amulet = served.service.wait_ready()
        self._live: dict[str, Sequence[ServiceStream]] = {}  # those that may be adjusted
        paths = {"/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"}
        self.metrics = Metrics(served.service, paths)
        self.tastes = Tastes(served.service, served.settings.system, self._read_profiles)

    def _read_profiles(self) -> None:
        if self._served.config is not None:
            self._served = dataclasses.replace(self._served, config=load_config())

    async def page(self) -> Response:
        return HTMLResponse(*_page())

    async def health(self) -> Response:
        is_open = not self._service.is_closed
        return as_json({"status": "ok" if is_open else "closed"}, 200 if is_open else 503)

    async def prometheus(self) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        names = [self._served.name, *(f"{self._served.name}:{s}" for s in self._served.suffixes)]
        return as_json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, name: str) -> Response:
        self._served.start(name, None)
        return as_json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        about = {
            "presets": list(PRESETS),
            "profiles": self._served.profiles,
            "n_ctx": self._amulet.engine.n_ctx,
            "max_preferences": min(MAX_PREFERENCES, self._served.n_sequences - 1),
            "max_tokens": self._served.max_tokens,
            "strength": self._amulet.planner.resolve(self._served.settings).strength,
        }
        return {"id": name, "object": "model", "created": 0, "owned_by": "local", "amulet": about}

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        settings = self._settings(body)
        messages = conversation(body.messages)
        if any(message["role"] == "system" for message in messages):
            settings = settings.replace(system=None)
        reply = self._reply(body, True)
        options = {"messages": messages, "draft": body.draft}
        return await self._answer(body, request, reply, settings, [options])

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        settings = self._settings(body)
        reply = self._reply(body, False)
        options = [{"text": prompt} for prompt in body.prompts()]
        return await self._answer(body, request, reply, settings, options)

    async def adjust(self, id: str, body: Adjustment) -> Response:
        streams = [stream for stream in self._live.get(id, ()) if not stream.is_finished]
        if not streams:
            raise RequestError(404, "there is no such answer being written", code="not_found")
        for stream in streams:
            stream.adjust(body.strength, body.weights)
        settings = streams[0].settings
        weights = [preference.weight for preference in settings.prefer]
        return as_json({"id": id, "strength": settings.strength, "weights": weights})

    def _settings(self, body: ChatRequest | CompletionRequest) -> Settings:
        served = self._served
        asked = body.changed()
        settings = dataclasses.replace(served.start(body.model, body.profile), **asked)
        if settings.max_tokens > served.max_tokens:
            if "max_tokens" in asked:
                message = f"max_tokens must be at most {served.max_tokens}"
                raise RequestError(400, message, code="invalid_value", param="max_tokens")
            settings = settings.replace(max_tokens=served.max_tokens)
        most = served.max_tokens if settings.think_tokens is None else settings.think_tokens
        settings = settings.replace(think_tokens=min(most, served.max_tokens))
        if settings.n_branches > served.n_sequences:
            message = f"this server takes at most {served.n_sequences - 1} preferences"
            raise RequestError(400, message, code="invalid_value", param="prefer")
        return settings

    def _reply(self, body: ChatRequest | CompletionRequest, is_chat: bool) -> Reply:
        return Reply(
            body.model or self._served.name,
            is_chat,
            self._amulet.model.token_bytes,
            body.n_logprobs,
            bool(body.explain),
            body.n or 1,
        )

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        request: Request,
        reply: Reply,
        settings: Settings,
        prompts: Sequence[dict[str, Any]],
    ) -> Response:
        if not 1 <= len(prompts) * reply.n <= MAX_ANSWERS:
            message = f"one request may ask for 1 to {MAX_ANSWERS} answers"
            raise RequestError(400, message, code="invalid_value", param="n")
        streams: list[ServiceStream] = []
        try:
            for prompt in prompts:
                for i in range(reply.n):
                    seed = None if settings.seed is None else (settings.seed + i) % 2**64
                    stream = self._service.stream(
                        settings=settings.replace(seed=seed),
                        is_adjustable=bool(body.adjustable),
                        n_alternatives=reply.n_alternatives,
                        **prompt,
                    )
                    streams.append(stream)
            for stream in streams:
                await stream.accepted()
            if body.stream:
                has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                return EventSourceResponse(
                    self._events(reply, streams, has_usage),
                    send_timeout=_SEND_SECONDS,
                )
            answers = await self._collect(streams, request)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return as_json(reply.whole(answers))

    async def _collect(self, streams: Sequence[ServiceStream], request: Request) -> list[Answer]:
        """Wait for whole answers, unless the client goes away."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            for stream in streams:
                stream.cancel()

        watching = asyncio.create_task(watch())
        try:
            return list(await asyncio.gather(*(stream.answer_async() for stream in streams)))
        finally:
            watching.cancel()
            self._count(streams)

    async def _events(
        self, reply: Reply, streams: Sequence[ServiceStream], has_usage: bool
    ) -> AsyncIterator[bytes]:
        self._live[reply.id] = streams
        try:
            if reply.is_chat:
                for index in range(len(streams)):
                    yield reply.opening(index)
            async for index, piece in _merged(streams):
                for each in reply.events(index, piece):
                    yield each
            if has_usage:
                yield reply.usage(stream.usage for stream in streams)
            yield DONE
        except AmuletError as error:
            yield event(RequestError.of(error).body)
        finally:
            del self._live[reply.id]
            for stream in streams:
                stream.cancel()
            self._count(streams)

    def _count(self, streams: Sequence[ServiceStream]) -> None:
        for stream in streams:
            self.metrics.count_answer(stream.usage, stream.timings)


async def _merged(streams: Sequence[ServiceStream]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of several answers as they come, each with its answer's number."""
    if len(streams) == 1:  # without the cost of a task
        async for piece in streams[0]:
            yield 0, piece
        return
    next_ones = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while next_ones:
            done, _ = await asyncio.wait(next_ones, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = next_ones.pop(task)
                found = task.result()
                if found is not None:
                    next_ones[asyncio.ensure_future(anext(streams[index], None))] = index
                    yield index, found
    finally:
        for task in next_ones:
            task.cancel()


@functools.cache
def _page() -> tuple[str, int, dict[str, str]]:
    """Return the page, its status and headers: its own script and style run, and nothing else."""
    html = importlib.resources.files("amulet_gguf.server").joinpath("page.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [hashlib.sha256(part.encode()).digest() for part in parts]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, 200, {"content-security-policy": policy, "cache-control": "no-cache"}
