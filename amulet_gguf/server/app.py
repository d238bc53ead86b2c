"""The endpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from amulet_gguf.errors import AmuletError
from amulet_gguf.home.config import load_config
from amulet_gguf.preferences import MAX_PREFERENCES, PRESETS
from amulet_gguf.server import anthropic, llamacpp, ollama, responses
from amulet_gguf.server.answering import Answering
from amulet_gguf.server.asked import Asked
from amulet_gguf.server.desk import Desk
from amulet_gguf.server.errors import RequestError, as_json
from amulet_gguf.server.guard import Access, Guard
from amulet_gguf.server.metrics import Metrics
from amulet_gguf.server.page import page_response
from amulet_gguf.server.paths import Paths
from amulet_gguf.server.replies import OpenAIReply
from amulet_gguf.server.schema import Adjustment, ChatRequest, CompletionRequest
from amulet_gguf.server.served import Served
from amulet_gguf.server.tastes import Tastes

#: Modules with `routes` and `PATHS`, beside OpenAI's chat completions.
DIALECTS: Final = (responses, anthropic, ollama, llamacpp)
#: What a server may do without, and under which path it is.
PARTS: Final = {"page": "/", "metrics": "/metrics", "slots": "/slots"}


def create_app(served: Served, access: Access | None = None, without: Collection[str] = ()) -> ASGIApp:
    """Return the server as an ASGI app, guarded.

    Args:
        without: `PARTS` that are left out.
    """
    access = access or Access()
    api = _Api(served)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for part in without:  # what comes first is what answers
        app.get(PARTS[part])(_absent)
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

    for dialect in DIALECTS:
        app.include_router(dialect.routes(api.desk))

    @app.exception_handler(RequestError)
    async def on_request_error(request: Request, error: RequestError) -> Response:
        return error.response_for(request.scope["path"])

    @app.exception_handler(AmuletError)
    async def on_amulet_error(request: Request, error: AmuletError) -> Response:
        return RequestError.of(error).response_for(request.scope["path"])

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response_for(request.scope["path"])

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        return RequestError(error.status_code, str(error.detail)).response_for(request.scope["path"])

    @app.exception_handler(Exception)  # the guard logs it
    async def on_other(request: Request, _: Exception) -> Response:
        failure = RequestError(500, "the server failed at this request")
        return failure.response_for(request.scope["path"])

    return guarded(app, access, api.metrics.count_request)


def guarded(app: ASGIApp, access: Access, count: Callable[[str, int], None]) -> ASGIApp:
    """Return an app that only those who may ask reach; arguments as `Guard`'s."""
    inner: ASGIApp = Paths(app)
    if access.allow_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=list(access.allow_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE", "OPTIONS"],
            allow_headers=["*"],  # clients send many of their own
            allow_credentials=True,  # some send them whether there are any or not
            allow_private_network=True,
        )
    return Guard(inner, access, count)


async def _absent(request: Request) -> Response:
    is_page = request.scope["path"] == PARTS["page"]
    message = "the server was started without this (--without)"
    raise RequestError(404 if is_page else 501, message, code="not_supported")  # as llama.cpp's


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
        paths = {"/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"}
        paths |= {path for dialect in DIALECTS for path in dialect.PATHS}
        self.metrics = Metrics(served.service, paths)
        self._answering = Answering(served.service, self.metrics)
        self.desk = Desk(lambda: self._served, self._answering)
        self.tastes = Tastes(served.service, served.settings.system, self._read_profiles)

    def _read_profiles(self) -> None:
        if self._served.config is not None:
            self._served = dataclasses.replace(self._served, config=load_config())

    async def page(self, request: Request) -> Response:
        return page_response(request)

    async def health(self) -> Response:
        is_open = not self._service.is_closed
        return as_json({"status": "ok" if is_open else "closed"}, 200 if is_open else 503)

    async def prometheus(self) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        names = [self._served.name, *(f"{self._served.name}:{s}" for s in self._served.suffixes)]
        return as_json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, name: str) -> Response:
        return as_json(self._model(self._served.named(name)[0]))

    def _model(self, name: str) -> dict[str, Any]:
        settings = self._served.settings_for(Asked({}, model=name))
        about = {
            "presets": list(PRESETS),
            "profiles": self._served.profiles,
            "n_ctx": self._amulet.engine.n_ctx,
            "max_preferences": min(MAX_PREFERENCES, self._served.n_sequences - 1),
            "max_tokens": self._served.max_tokens,
            "strength": self._amulet.planner.resolve(settings).strength,
            "defaults": {
                "prefer": [{"text": each.name, "weight": each.weight} for each in settings.prefer],
                "avoid": settings.avoid,
                "system": settings.system,
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
            },
        }
        model = self._amulet.model
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "max_model_len": self._amulet.engine.n_ctx,
            "meta": {"n_vocab": model.n_vocab, "n_params": model.n_parameters},
            "amulet": about,
        }

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        return await self._answer(body, request, is_chat=True)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        return await self._answer(body, request, is_chat=False)

    async def adjust(self, id: str, body: Adjustment) -> Response:
        streams = [stream for stream in self._answering.live.get(id, ()) if not stream.is_finished]
        if not streams:
            raise RequestError(404, "there is no such answer being written", code="not_found")
        for stream in streams:
            stream.adjust(body.strength, body.weights)
        settings = streams[0].settings
        weights = [preference.weight for preference in settings.prefer]
        return as_json({"id": id, "strength": settings.strength, "weights": weights})

    async def _answer(
        self, body: ChatRequest | CompletionRequest, request: Request, *, is_chat: bool
    ) -> Response:
        asked = body.asked()
        settings = self._served.settings_for(asked)
        is_verbose = isinstance(body, ChatRequest) and bool(body.verbose)
        has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        reply = OpenAIReply(
            self._served.named(asked.model)[0],
            is_chat,
            self._amulet.model.token_bytes,
            body.n_logprobs,
            bool(body.explain),
            asked.n,
            has_usage,
            await self.desk.prompt(asked, settings) if is_verbose else None,
            bool(body.timings_per_token),
        )
        asked = dataclasses.replace(asked, n_alternatives=reply.n_alternatives)
        return await self._answering.answer(
            asked, settings, reply, request, is_streamed=bool(body.stream)
        )
