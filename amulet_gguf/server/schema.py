"""What may be asked: OpenAI's requests with this project's fields, as pydantic models."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from amulet_gguf.prompts.messages import THOUGHT
from amulet_gguf.server.errors import RequestError
from amulet_gguf.settings import SETTINGS

#: Answers that one request may ask for.
MAX_ANSWERS: Final = 16

# Fields of OpenAI's that mean nothing here, so that it does no harm to ignore them.
_IGNORED: Final = frozenset({
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key",
    "prompt_cache_retention", "safety_identifier", "verbosity",
})  # fmt: skip
# Fields that would change the answer: only the value that does not is taken.
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
#: What other programs call some of them.
_ALIASES: Final = {
    "negative_prompt": "avoid",
    "guidance_scale": "strength",
    "chat_template_kwargs": "template_args",
}
#: Settings that a request may have; a system prompt is one of its messages.
_SETTINGS: Final = tuple(name for name in SETTINGS if name != "system")


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(_Asked):
    type: Literal["text"]
    text: str


class ChatMessage(_Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None


class StreamOptions(_Asked):
    include_usage: bool | None = None


class _Request(_Asked):
    """What both kinds of request have, beside the fields of `amulet_gguf.settings.Settings`."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    profile: str | None = None
    adjustable: bool | None = None
    explain: bool | None = None

    def changed(self) -> dict[str, Any]:
        """Return the fields of `Settings` that were given.

        Raises:
            RequestError: a field that is not known or not possible here.
        """
        self._check_others()
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for alias, name in _ALIASES.items():
            if alias in extra and name in extra:
                raise RequestError(400, f"{alias} and {name} are the same: send one", param=alias)
            if alias in extra:
                extra[name] = extra.pop(alias)
        return {name: extra[name] for name in _SETTINGS if name in extra}

    def _check_others(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if (
                name in _SETTINGS
                or name in _ALIASES
                or name in _IGNORED
                or (name in _UNSUPPORTED and value is None)
            ):
                continue
            if name not in _UNSUPPORTED:
                known = (*type(self).model_fields, *_SETTINGS)
                near = difflib.get_close_matches(name, known, n=1)
                cure = f"; did you mean {near[0]}?" if near else ""
                message = f"unknown field {name[:64]!r}{cure}"
                raise RequestError(400, message, code="unknown_parameter", param=name[:64])
            if value not in _UNSUPPORTED[name]:
                message = f"{name} is not supported by this server"
                raise RequestError(400, message, code="unsupported_parameter", param=name)


class Prediction(_Asked):
    """What the answer may be much like: an earlier one, or a text that it is to change a little."""

    type: Literal["content"]
    content: str | list[TextPart]


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    prediction: Prediction | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def changed(self) -> dict[str, Any]:
        given = super().changed()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
            given.setdefault("think_tokens", self.max_completion_tokens)
        if self.reasoning_effort in ("none", "minimal"):
            given.setdefault("think", False)
        elif self.reasoning_effort is not None:
            given.setdefault("think_effort", self.reasoning_effort.removeprefix("x"))
        return given

    @property
    def draft(self) -> str | None:
        """The prediction as a text."""
        return None if self.prediction is None else _text(self.prediction.content)

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def conversation(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Return messages as the package has them.

    Raises:
        RequestError: one of them holds what is not supported.
    """
    found = []
    for message in messages:
        extra = message.model_extra or {}
        if extra.get("tool_calls") or extra.get("function_call"):
            raise RequestError(400, "tool calls are not supported by this server", param="messages")
        if message.content is None and message.role != "assistant":
            raise RequestError(400, f"a message of the {message.role} needs content", param="messages")
        role = "system" if message.role == "developer" else message.role
        known = {"role": role, "content": _text(message.content or "")}
        if isinstance(extra.get(THOUGHT), str):
            known[THOUGHT] = extra[THOUGHT]
        found.append(known)
    return found


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0, le=5)

    def prompts(self) -> Sequence[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs


class Adjustment(BaseModel):
    """PATCH /v1/chat/completions/{id}."""

    model_config = ConfigDict(strict=True, extra="forbid")

    strength: float | None = None
    weights: list[float] | None = None


class TasteAnswer(BaseModel):
    """An answer that was shown, and the preference that it was written with, "" for none."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: str
    prefer: str = ""


class TasteChoice(BaseModel):
    """POST /v1/tastes/{name}. `own`: preferences of the person's that are attributes."""

    model_config = ConfigDict(strict=True, extra="forbid")

    messages: list[ChatMessage]
    better: TasteAnswer
    worse: TasteAnswer
    own: list[str] = []
