"""The model `amulet` of simonw's `llm`: `llm -m amulet -o prefer concise -o strength 4 "…"`.

Only `llm` itself is imported until a prompt comes, since every command of `llm` imports this.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field

if TYPE_CHECKING:
    from amulet_gguf.service.service import AmuletService
    from amulet_gguf.service.stream import ServiceStream
    from amulet_gguf.settings import Settings

_lock = threading.Lock()
_loaded: dict[tuple[str | None, int | None], AmuletService] = {}


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    register(AmuletModel(), AmuletAsyncModel())


class _Options(llm.Options):
    """What `-o NAME VALUE` takes; `amulet_gguf.settings` says which values are possible."""

    prefer: str | None = Field(
        None,
        description="What the answer should be: a preset such as concise, or a sentence; TEXT:WEIGHT "
        "for a weight, several with ; between them",
    )
    strength: float | None = Field(None, description="0: the base model, 1: prompting, more: beyond it")
    plausibility: float | None = Field(None, description="Rule out tokens less probable than this share")
    adapt: str | None = Field(None, description="none, divergence or entropy")
    placement: str | None = Field(None, description="Where the preference is said: turn or system")
    max_tokens: int | None = Field(None, description="Length of the answer at most")
    temperature: float | None = Field(None, description="0: always the best token")
    top_k: int | None = Field(None, description="Keep the best k tokens")
    top_p: float | None = Field(None, description="Keep the best tokens up to this probability")
    min_p: float | None = Field(None, description="Keep tokens this times as probable as the best")
    repeat_penalty: float | None = Field(None, description="Make recent tokens less probable; 1: off")
    seed: int | None = Field(None, description="Same seed, same text")
    stop: str | None = Field(None, description="End before this text")
    profile: str | None = Field(None, description="Begin with a profile (amulet profiles ls)")
    model: str | None = Field(None, description="File or name of a model (amulet models ls)")
    n_ctx: int | None = Field(None, description="Tokens of prompt and answer together")


def _settings(options: Any, system: str | None) -> Settings:
    """Return the settings of a prompt: what is typed, the profile, the defaults."""
    import dataclasses

    from amulet_gguf.home.config import load_config
    from amulet_gguf.settings import Settings

    given = {name: value for name, value in options.model_dump().items() if value is not None}
    for name in ("model", "n_ctx"):
        given.pop(name, None)
    settings = Settings()
    if profile := given.pop("profile", None):
        settings = load_config().settings(profile, settings)
    if "prefer" in given:
        given["prefer"] = [part for part in given["prefer"].split(";") if part.strip()]
    if system:
        given["system"] = system
    return dataclasses.replace(settings, **given)


def _service(options: Any) -> AmuletService:
    """Return the model that is asked for, which stays loaded for the prompts after."""
    from amulet_gguf.service.service import AmuletService

    key = (options.model, options.n_ctx)
    with _lock:
        if key not in _loaded or _loaded[key].is_closed:
            for service in _loaded.values():  # one is enough for a machine
                service.close()
            _loaded.clear()
            _loaded[key] = AmuletService(options.model, n_ctx=options.n_ctx)
        return _loaded[key]


def _ask(prompt: Any, turns: list[tuple[str, str]], system: str | None) -> ServiceStream:
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    messages.append({"role": "user", "content": prompt.prompt or ""})
    settings = _settings(prompt.options, system)
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


class AmuletModel(llm.Model):
    """Answers on the caller's thread."""

    model_id = "amulet"
    can_stream = True

    Options = _Options  # type: ignore[assignment]

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
                    yield from (piece.text for piece in answer if piece.text)
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

    Options = _Options  # type: ignore[assignment]

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
                        if piece.text:
                            yield piece.text
                else:
                    yield (await answer.answer_async()).text
            finally:
                _end(answer, response)
        except AmuletError as error:
            raise llm.ModelError(str(error)) from None
