"""Functions that a model may call, how it is told of them, and how families write calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from amulet_gguf.errors import SettingError, shown
from amulet_gguf.prompts.messages import is_deep

_NAME: Final = re.compile(r"[\w.-]{1,64}", re.ASCII)
_MAX_TOOLS: Final = 128
_CHOICES: Final = ("auto", "none", "required")  # not to be told from functions of these names


@dataclass(frozen=True)
class Form:
    """How a family of models writes a call: its texts stand around a name and JSON arguments.

    Attributes:
        opens: what a call is recognized by.
        before, between, after: the name, name and arguments, the arguments.
        closes: what may stand behind it; shown to nobody.
        told: what a template of the family holds.
        is_alone: it is a call only where the answer begins with it.
    """

    opens: str
    before: str
    between: str
    after: str
    closes: str
    told: tuple[str, ...]
    is_alone: bool = False

    @property
    def all(self) -> str:
        return self.opens + self.before + self.between + self.after + self.closes


#: What most families are trained on, and what others understand when they are told.
HERMES: Final = Form(
    "<tool_call>",
    '\n{"name": "',
    '", "arguments": ',
    "}",
    "\n</tool_call>",
    ("<tool_call>", '"arguments"'),
)
#: The first whose texts a template holds is that of its model.
_FORMS: Final = (
    Form("[TOOL_CALLS]", "", "[ARGS]", "", "", ("[TOOL_CALLS]", "[ARGS]")),  # Mistral, 2025
    Form(
        "[TOOL_CALLS]", '[{"name": "', '", "arguments": ', "}]", "", ("[TOOL_CALLS]",)
    ),  # Mistral, 2024
    Form(  # Cohere
        "<|START_ACTION|>",
        '[\n    {"tool_call_id": "0", "tool_name": "',
        '", "parameters": ',
        "}\n]",
        "<|END_ACTION|>",
        ("<|START_ACTION|>", '"tool_name"'),
    ),
    Form(  # Kimi K2
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.",
        ":0<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
        ("<|tool_calls_section_begin|>",),
    ),
    Form(
        '{"name":', ' "', '", "parameters": ', "}", "", ('{"name": function name, "parameters"',), True
    ),  # Llama
    Form(  # Apriel
        "<tool_calls>[", '{"name": "', '", "arguments": ', "}]", "</tool_calls>", ("<tool_calls>[",)
    ),
    Form(  # Nemotron Nano 2
        "<TOOLCALL>[", '{"name": "', '", "arguments": ', "}]", "</TOOLCALL>", ("<TOOLCALL>[",)
    ),
    Form(  # MiniMax M1
        "<tool_calls>",
        '\n{"name": "',
        '", "arguments": ',
        "}",
        "\n</tool_calls>",
        ("<tool_calls>", '"arguments"'),
    ),
    HERMES,
)
#: Families that write arguments as something else than JSON, or whose templates leave calls out: they
#: are told to write them as `HERMES`.
_FOREIGN: Final = (
    "<function=", "<arg_key>", "<parameter name=", "<|tool_call>", "<|tool_call_start|>",
    "<|tool_call|>",
)  # fmt: skip
_TOLD: Final = (
    "You may call functions to help with what the user asks. They are, one a line, as JSON:\n"
    "{functions}\n\n"
    "To call one, write its name and arguments as JSON between these tags:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{}}}}\n</tool_call>'
)


@dataclass(frozen=True, eq=False)
class Tools:
    """Functions that the model may call.

    Attributes:
        functions: as OpenAI's API describes them: {"type": "function", "function": {"name": …,
            "description": …, "parameters": a JSON schema}}.
        choice: "auto": as the model likes; "required": at least one is called; or the name of the one
            to call.
        is_parallel: there may be several calls in one answer.

    Raises:
        SettingError: what is described is no function, or none is of the name that is chosen.
    """

    functions: Sequence[Mapping[str, Any]]
    choice: str = "auto"
    is_parallel: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.functions, Sequence) or isinstance(self.functions, str):
            raise SettingError(f"tools: expected functions, got {shown(self.functions)}", "tools")
        if not 1 <= len(self.functions) <= _MAX_TOOLS:
            raise SettingError(f"tools: 1 to {_MAX_TOOLS} functions, got {len(self.functions)}", "tools")
        for i, each in enumerate(self.functions):
            function = each.get("function") if isinstance(each, Mapping) else None
            if not isinstance(function, Mapping) or each.get("type", "function") != "function":
                raise SettingError(f"tools.{i}: expected a function, got {shown(each)}", "tools")
            name = function.get("name")
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise SettingError(f"tools.{i}.function.name: no name is {shown(name)}", "tools")
            parameters = function.get("parameters") or {}
            if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
                message = f"tools.{i}.function.parameters: expected a JSON schema of an object"
                raise SettingError(message, "tools")
            if name in _CHOICES:
                raise SettingError(f"tools.{i}.function.name: {name} is a choice of tools", "tools")
        if any(map(is_deep, self.functions)):
            raise SettingError("tools: a function is nested too deeply", "tools")
        try:
            json.dumps(list(map(dict, self.functions)), allow_nan=False)
        except (TypeError, ValueError):
            raise SettingError("tools: expected JSON", "tools") from None
        if len(self.schemas) != len(self.functions):
            raise SettingError("tools: two of them have one name", "tools")
        is_known = isinstance(self.choice, str) and self.choice in ("auto", "required", *self.schemas)
        if not is_known:
            raise SettingError(f"tool_choice: there is no function {shown(self.choice)}", "tool_choice")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tools) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, str, bool]:
        return json.dumps(list(map(dict, self.functions))), self.choice, self.is_parallel

    @property
    def described(self) -> list[dict[str, Any]]:
        """The functions with everything that templates look for."""
        found = []
        for each in self.functions:
            function = {"description": "", **each["function"]}
            function["parameters"] = self.schemas[function["name"]]
            found.append({"type": "function", "function": function})
        return found

    @property
    def schemas(self) -> dict[str, Any]:
        """The JSON schema of each function's arguments, by its name."""
        found = {}
        for each in self.functions:
            function = each["function"]
            schema = function.get("parameters") or {}
            found[function["name"]] = {"type": "object", "properties": {}} | dict(schema)
        return found

    @property
    def callable(self) -> dict[str, Any]:
        """Those of `schemas` that may be called."""
        schemas = self.schemas
        return schemas if self.choice in ("auto", "required") else {self.choice: schemas[self.choice]}

    @property
    def is_needed(self) -> bool:
        """Whether there must be a call."""
        return self.choice != "auto"


def form_of(template: str) -> tuple[Form, bool]:
    """Return how a model writes calls, and whether its chat template tells it about functions itself."""
    if "tools" in template and not any(mark in template for mark in _FOREIGN):
        for form in _FORMS:
            if all(mark in template for mark in form.told):
                return form, True
    return HERMES, False


def in_words(messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> list[dict[str, Any]]:
    """Return a conversation in which functions, calls and what came of them are text."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            found.append({"role": "user", "content": content})
        elif message.get("tool_calls"):
            calls = [
                json.dumps({"name": f["name"], "arguments": f["arguments"]}, ensure_ascii=False)
                for f in (call["function"] for call in message["tool_calls"])
            ]
            said = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
            found.append({"role": "assistant", "content": "\n".join(filter(None, said))})
        else:
            found.append(dict(message))
    if tools is not None:
        lines = "\n".join(json.dumps(each["function"], ensure_ascii=False) for each in tools.described)
        told = _TOLD.format(functions=lines)
        if found[0]["role"] == "system":
            found[0]["content"] = "\n\n".join(filter(None, [found[0]["content"], told]))
        else:
            found.insert(0, {"role": "system", "content": told})
    return found
