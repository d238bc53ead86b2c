"""What llama.cpp's own server has beside OpenAI's API: raw prompts, tokens, templates, properties."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from amulet_gguf.amulet import Amulet
from amulet_gguf.errors import PromptTooLongError
from amulet_gguf.llama.model import Model
from amulet_gguf.server.asked import Asked, tools_in
from amulet_gguf.server.completion import CompletionBody, CompletionReply, Parts, prompts_of, told
from amulet_gguf.server.desk import Desk, unusable
from amulet_gguf.server.errors import as_json
from amulet_gguf.server.replies import FINGERPRINT
from amulet_gguf.server.schema import ChatMessage, ChatRequest, Open, conversation

PATHS: Final = (
    "/completion",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/props",
    "/slots",
    "/v1/chat/completions/input_tokens",
)

_MAX_TOKENS: Final = 262_144  # to be turned into text one by one


def routes(desk: Desk) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/completion")
    async def complete(body: CompletionBody, request: Request) -> Response:
        prompts = prompts_of(body.prompt)
        asked = Asked(body.changes(), model=body.model, profile=body.profile, n=body.n_cmpl or 1)
        name, settings = desk.settings_for(asked)

        def looked(amulet: Amulet) -> list[tuple[list[int], str]]:
            read = [_tokens(amulet, parts) for parts in prompts]
            longest = max(map(len, read))
            if longest >= amulet.engine.n_ctx:  # before it becomes a text again
                raise PromptTooLongError(longest, amulet.engine.n_ctx)
            return [(tokens, _text(amulet.model, tokens)) for tokens in read]

        found = await desk.look(looked)
        texts = [text for _, text in found for _ in range(asked.n)]
        about = told(settings, body.n_probs or 0, bool(body.stream))
        reply = CompletionReply(name, texts, about, body, desk.amulet.model.token_bytes)
        tokens = [tokens for tokens, _ in found]
        asked = dataclasses.replace(asked, texts=tokens, n_alternatives=body.n_probs or 0)
        return await desk.answer(asked, settings, reply, request, bool(body.stream))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        return as_json({"tokens": await desk.look(body.tokens)})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        return as_json({"content": await desk.look(lambda a: _text(a.model, body.tokens))})

    @router.post("/apply-template")
    async def apply(body: TemplateBody) -> Response:
        tools = tools_in(body.tools, None, None)
        asked = Asked(body.changes(), conversation(body.messages), tools=tools)
        _, settings = desk.settings_for(asked)

        return as_json({"prompt": await desk.prompt(asked, settings)})

    @router.post("/v1/chat/completions/input_tokens")
    async def count(body: ChatRequest) -> Response:
        n_tokens = await desk.count(body.asked())
        return as_json({"object": "response.input_tokens", "input_tokens": n_tokens})

    @router.get("/props")
    async def props() -> Response:
        return as_json(_props(desk))

    @router.get("/slots")
    async def slots() -> Response:
        # Programs look here for whether it is busy. What is asked is nobody else's business.
        n_busy = desk.served.service.n_live
        n_ctx = desk.amulet.engine.n_ctx
        each = [
            {"id": i, "n_ctx": n_ctx, "is_processing": i < n_busy} for i in range(desk.served.n_slots)
        ]
        return as_json(each)

    return router


class TokenizeBody(Open):
    """POST /tokenize."""

    content: str | list[str | int]
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False

    def tokens(self, amulet: Amulet) -> list[Any]:
        """Return them, each with its text if that is wanted; errors as `_text`."""
        model = amulet.model
        found: list[int] = []
        for part in [self.content] if isinstance(self.content, str) else self.content:
            if isinstance(part, str):
                found += model.tokenize(part, special=self.parse_special).tolist()
            else:
                found.append(part)
        if len(found) > _MAX_TOKENS:
            raise unusable(f"the text has more than {_MAX_TOKENS} tokens: send it in parts", "content")
        if self.add_special and model.adds_bos and model.bos >= 0 and found[:1] != [model.bos]:
            found.insert(0, model.bos)
        if not self.with_pieces:
            return found
        return [{"id": token, "piece": _readable(_bytes(model, token))} for token in found]


class DetokenizeBody(Open):
    """POST /detokenize."""

    tokens: list[int] = Field(max_length=_MAX_TOKENS)


class TemplateBody(Open):
    """POST /apply-template."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None


def _tokens(amulet: Amulet, parts: Parts) -> list[int]:
    found: list[int] = []
    for i, part in enumerate(parts):
        if not isinstance(part, str):
            found.append(part)
        elif i == 0:
            found += amulet.planner.template.encode_markup(part).tolist()
        else:
            found += amulet.model.tokenize(part, special=True).tolist()
    return found


def _bytes(model: Model, token: int) -> bytes:
    """Return the bytes of a token, for a control token those of its name.

    Raises:
        RequestError: there is no such token.
    """
    if not 0 <= token < model.n_vocab:
        message = f"there is no token {str(token)[:20]}: the model has {model.n_vocab}"
        raise unusable(message, "tokens")
    return model.token_bytes(token) or model.token_text(token).encode()


def _text(model: Model, tokens: Iterable[int]) -> str:
    """Return the text of tokens; errors as `_bytes`."""
    return b"".join(_bytes(model, token) for token in tokens).decode("utf-8", "replace")


def _readable(data: bytes) -> str | list[int]:
    """Return bytes as llama.cpp does: a text, or numbers where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _props(desk: Desk) -> dict[str, Any]:
    amulet, served = desk.amulet, desk.served
    model = amulet.model
    params = told(served.settings, 0, False)
    return {
        "default_generation_settings": {"n_ctx": amulet.engine.n_ctx, "params": params},
        "total_slots": served.n_slots,
        "model_alias": served.name,
        "model_path": model.path.name,  # where it lies is the owner's business
        "modalities": {"vision": False, "audio": False},
        "chat_template": model.chat_template or "",
        "bos_token": model.token_text(model.bos) if model.bos >= 0 else "",
        "eos_token": model.token_text(model.eos) if model.eos >= 0 else "",
        "build_info": FINGERPRINT,
        "is_sleeping": False,
    }
