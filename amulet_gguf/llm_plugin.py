"""The model `amulet` of simonw's `llm`: `llm -m amulet -o prefer concise -o strength 4 "…"`.

Neither numpy nor llama.cpp is imported until a prompt comes: every command of `llm` imports this.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field, create_model

from amulet_gguf.declaration import Kind, Setting
from amulet_gguf.llama.loading import LOADING, Loading
from amulet_gguf.preferences import parse_preferences
from amulet_gguf.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from amulet_gguf.engine.answer import Piece
    from amulet_gguf.service.service import AmuletService
    from amulet_gguf.service.stream import ServiceStream

#: Those for which llm has no options of its own.
_SETTINGS = {name: each for name, each in SETTINGS.items() if name not in ("system", "schema")}
_lock = threading.Lock()
_loaded: dict[Loading, AmuletService] = {}


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    register(AmuletModel(), AmuletAsyncModel())


def _options() -> type[llm.Options]:
    """Return what `-o NAME VALUE` takes: the declared settings, and how to load the model."""
    types: dict[Kind, Any] = {"number": float, "whole": int, "switch": bool}
    fields: dict[str, Any] = {
        name: (
            (float | str if each.words else types.get(each.kind, str)) | None,
            Field(None, description=each.help),
        )
        for name, each in {**_SETTINGS, **LOADING}.items()
    }
    fields["profile"] = (
        str | None,
        Field(None, description="Begin with a profile (amulet profiles ls)"),
    )
    options: type[llm.Options] = create_model("Options", __base__=llm.Options, **fields)
    return options


def _given(options: Any, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the values of those settings that were typed."""
    given = {name: getattr(options, name, None) for name in known}
    return {
        name: known[name].parse(name, each) if isinstance(each, str) else each
        for name, each in given.items()
        if each is not None
    }


def _settings(options: Any, system: str | None, schema: Any = None) -> Settings:
    """Return the settings of a prompt: what is typed, the profile, the defaults."""
    from amulet_gguf.home.config import load_config

    settings = Settings()
    if options.profile not in (None, "none"):
        settings = load_config().settings(options.profile, settings)
    given = _given(options, _SETTINGS)
    if isinstance(options.prefer, str) and options.prefer[:1] != "[" and given["prefer"]:
        given["prefer"] = parse_preferences(options.prefer)
    if system:
        given["system"] = system
    if schema is not None:
        given["schema"] = schema
    return dataclasses.replace(settings, **given)


def _service(options: Any) -> AmuletService:
    """Return the model that is asked for, which stays loaded for the prompts after."""
    from amulet_gguf.home.config import load_config
    from amulet_gguf.service.service import AmuletService

    profile: Mapping[str, Any] = {}
    if options.profile not in (None, "none"):
        profile = load_config().values(options.profile)
    chosen = {name: each for name, each in profile.items() if name in LOADING}
    key = Loading(**{**chosen, **_given(options, LOADING)})
    with _lock:
        if key not in _loaded or _loaded[key].is_closed:
            for service in _loaded.values():  # one is enough for a machine
                service.close()
            _loaded.clear()
            _loaded[key] = AmuletService(key.model, **key.options)
        return _loaded[key]


def _ask(prompt: Any, turns: list[tuple[str, str]], system: str | None) -> ServiceStream:
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    messages.append({"role": "user", "content": prompt.prompt or ""})
    settings = _settings(prompt.options, system, getattr(prompt, "schema", None))
    return _service(prompt.options).stream(messages=messages, settings=settings, is_adjustable=False)


def _system(prompt: Any, responses: Any) -> str | None:
    """Return the system prompt: of this turn, or of the last before that had one."""
    prompts = [*(response.prompt for response in responses), prompt]
    found = [each.system for each in prompts if each.system]
    return found[-1] if found else None


def _end(stream: ServiceStream, response: Any) -> None:
    stream.cancel()
    usage = stream.usage
    response.set_usage(input=usage.prompt_tokens, output=usage.completion_tokens)


def _chunk(piece: Piece) -> Any:
    """Return what llm is told of a piece: text, or with newer versions a thought as reasoning."""
    if piece.kind == "answer" or not piece.text:
        return piece.text
    try:
        from llm.parts import StreamEvent
    except ImportError:
        return ""
    return StreamEvent(type="reasoning", chunk=piece.text)


class AmuletModel(llm.Model):
    """Answers on the caller's thread."""

    model_id = "amulet"
    can_stream = True
    supports_schema = True

    Options = _options()  # type: ignore[assignment]

    def __str__(self) -> str:
        return "Amulet: amulet"

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        from amulet_gguf.errors import AmuletError

        responses = conversation.responses if conversation is not None else []
        try:
            turns = [(each.prompt.prompt or "", each.text()) for each in responses]
            answer = _ask(prompt, turns, _system(prompt, responses))
            try:
                if stream:
                    yield from filter(None, map(_chunk, answer))
                else:
                    yield answer.answer().text
            finally:
                _end(answer, response)
        except AmuletError as error:
            raise llm.ModelError(str(error)) from None


class AmuletAsyncModel(llm.AsyncModel):
    """Answers in a task."""

    model_id = "amulet"
    can_stream = True
    supports_schema = True

    Options = _options()  # type: ignore[assignment]

    def __str__(self) -> str:
        return "Amulet (async): amulet"

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any
    ) -> AsyncGenerator[str, None]:
        from amulet_gguf.errors import AmuletError

        responses = conversation.responses if conversation is not None else []
        try:
            turns = [(each.prompt.prompt or "", await each.text()) for each in responses]
            answer = _ask(prompt, turns, _system(prompt, responses))
            try:
                if stream:
                    async for piece in answer:
                        if chunk := _chunk(piece):
                            yield chunk
                else:
                    yield (await answer.answer_async()).text
            finally:
                _end(answer, response)
        except AmuletError as error:
            raise llm.ModelError(str(error)) from None
