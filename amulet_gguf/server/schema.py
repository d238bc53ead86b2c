"""What may be asked in OpenAI's words: completions and chat completions, with this project's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from amulet_gguf.prompts.messages import THOUGHT
from amulet_gguf.server.asked import MAX_ANSWERS, Asked, changes_in, tools_in
from amulet_gguf.server.errors import RequestError
from amulet_gguf.server.schemas import held


def _whole(value: Any) -> Any:
    """4.0 is how some programs spell whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Open(BaseModel):
    """A request of which not all fields are named: others are settings, or looked at one by one."""

    model_config = ConfigDict(strict=True, extra="allow")

    def changes(self) -> dict[str, Any]:
        """Return the fields of `Settings` that were given; errors as `changes_in`."""
        return changes_in(self.model_extra or {}, type(self).model_fields)


class TextPart(Open):
    type: Literal["text"]
    text: str


def _spoken(content: Any) -> Any:
    """A refusal is what the assistant said; other parts than text are told by what they are."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            part = {"type": "text", "text": part.get("refusal")}
        elif isinstance(kind, str) and kind != "text":
            message = "only text is understood, no {kind}"
            raise PydanticCustomError("not_text", message, {"kind": kind[:32]})
        parts.append(part)
    return parts


class ChatMessage(Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_spoken)] = None


class StreamOptions(Open):
    include_usage: bool | None = None


class ResponseFormat(Open):
    """What form the answer is to have; llama.cpp takes `schema` beside `json_object`, too."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @property
    def schema_(self) -> Any:
        """The JSON schema, or None.

        Raises:
            RequestError: there is none where one is needed.
        """
        if self.type == "text":
            return None
        extra = self.model_extra or {}
        described = self.json_schema or {}
        schema = described.get("schema", extra.get("schema"))
        if schema is None and self.type == "json_schema":
            where = "response_format.json_schema.schema"
            raise RequestError(400, f"{where} is missing", code="invalid_value", param=where)
        if schema is None:
            return {"type": "object"}
        if self.type == "json_schema" and described.get("strict") is not True:
            return held(schema, "response_format", is_strict=False)
        return schema


class _Request(Open):
    """What both kinds of request have, beside the fields of `amulet_gguf.settings.Settings`."""

    model: str | None = None
    n: Whole | None = Field(None, ge=1, le=MAX_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    return_progress: bool | None = None
    timings_per_token: bool | None = None
    profile: str | None = None
    adjustable: bool | None = None
    explain: bool | None = None

    def changes(self) -> dict[str, Any]:
        changes = super().changes()
        schema = None if self.response_format is None else self.response_format.schema_
        if schema is not None:
            changes["schema"] = schema
        return changes

    def common(self) -> dict[str, Any]:
        """Return what of `Asked` both kinds have."""
        return {
            "changes": self.changes(),
            "model": self.model,
            "profile": self.profile,
            "n": self.n or 1,
            "is_adjustable": bool(self.adjustable),
            "has_progress": bool(self.return_progress),
        }


class Prediction(Open):
    """What the answer may be much like: an earlier one, or a text that it is to change a little."""

    type: Literal["content"]
    content: str | list[TextPart]


class ToolName(Open):
    name: str


class ToolChoice(Open):
    """The one function that is to be called."""

    type: Literal["function"]
    function: ToolName


class AllowedTools(Open):
    mode: Literal["auto", "required"]
    tools: list[ToolChoice]


class AllowedChoice(Open):
    """Those functions that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: Whole | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    prediction: Prediction | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    verbose: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | ToolChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None

    def changes(self) -> dict[str, Any]:
        changes = super().changes()
        if self.max_completion_tokens is not None:
            most = None if self.max_completion_tokens == -1 else self.max_completion_tokens
            changes["max_tokens"] = most
            changes.setdefault("think_tokens", most)
        if self.reasoning_effort in ("none", "minimal"):
            changes.setdefault("think", False)
        elif self.reasoning_effort is not None:
            effort = "high" if self.reasoning_effort in ("xhigh", "max") else self.reasoning_effort
            changes.setdefault("think_effort", effort)
        return changes

    def asked(self) -> Asked:
        """Return what is asked for.

        Raises:
            RequestError: a field that is not known or not possible here.
        """
        if self.add_generation_prompt and self.continue_final_message:
            message = "add_generation_prompt and continue_final_message exclude each other"
            raise RequestError(400, message, param="continue_final_message")
        if self.continue_final_message and self.messages and self.messages[-1].role != "assistant":
            message = "continue_final_message needs a last message of the assistant's"
            raise RequestError(400, message, param="continue_final_message")
        draft = None if self.prediction is None else text_of(self.prediction.content)
        choice, allowed = self._choice()
        tools = tools_in(self.tools, choice, self.parallel_tool_calls, allowed)
        return Asked(**self.common(), messages=conversation(self.messages), draft=draft, tools=tools)

    def _choice(self) -> tuple[str | None, list[str] | None]:
        """Return what `tools_in` is told of the choice."""
        choice = self.tool_choice
        if isinstance(choice, ToolChoice):
            return choice.function.name, None
        if isinstance(choice, AllowedChoice):
            chosen = choice.allowed_tools
            return chosen.mode, [tool.function.name for tool in chosen.tools]
        return "required" if choice == "any" else choice, None  # Mistral's word

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def text_of(content: str | Sequence[TextPart]) -> str:
    """Return the text of a content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def conversation(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as the package has them.

    Raises:
        RequestError: one of them holds what is not supported.
    """
    found = []
    for message in messages:
        extra = message.model_extra or {}
        if extra.get("function_call"):
            where = "messages: function_call is tool_calls now"
            raise RequestError(400, where, param="messages")
        if message.content is None and message.role != "assistant":
            raise RequestError(400, f"a message of the {message.role} needs content", param="messages")
        role = "system" if message.role == "developer" else message.role
        known: dict[str, Any] = {"role": role, "content": text_of(message.content or "")}
        known |= {name: extra[name] for name in ("tool_calls", "tool_call_id") if extra.get(name)}
        if isinstance(extra.get(THOUGHT), str):
            known[THOUGHT] = extra[THOUGHT]
        found.append(known)
    return found


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str]
    logprobs: Whole | None = Field(None, ge=0, le=5)

    def asked(self) -> Asked:
        """Return what is asked for; errors as `ChatRequest.asked`."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return Asked(**self.common(), texts=texts)

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
