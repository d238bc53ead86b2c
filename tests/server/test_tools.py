"""Functions that clients offer: called as OpenAI's API has it, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from fixture_types import Tiny
from serving import Running, is_free, serving, until

CHAT = "/v1/chat/completions"
FUNCTIONS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo"]},
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    },
]
ASKED: dict[str, Any] = {
    "model": "amulet", "messages": [{"role": "user", "content": "How is the weather?"}],
    "max_tokens": 80, "temperature": 0.8, "seed": 4, "tools": FUNCTIONS,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Running]:
    with serving(tiny("qwen3"), n_ctx=1024) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client
    until(lambda: is_free(server.service))


@pytest.mark.parametrize("prefer", ["", "concise"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["any", "one"]
)
def test_a_call_streamed_is_the_call_whole(client: Any, choice: Any, prefer: str) -> None:
    more = {"extra_body": {"prefer": prefer} if prefer else {}}
    whole = client.chat.completions.create(
        **ASKED, tool_choice=choice, parallel_tool_calls=False, **more
    )
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    assert call.type == "function"
    assert len(call.id) == 9
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert arguments["city"] in ("Rome", "Oslo")
        assert isinstance(arguments["days"], int)
    else:
        assert (call.function.name, arguments) == ("now", {})
        assert choice == "required"

    name, text, ids, n_parts = "", "", set(), 0
    for chunk in client.chat.completions.create(
        **ASKED, tool_choice=choice, parallel_tool_calls=False, stream=True, **more
    ):
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.index == 0
            name += part.function.name or ""
            text += part.function.arguments or ""
            ids |= {part.id} - {None}
            n_parts += 1
        reason = chunk.choices[0].finish_reason
    assert (name, text, reason) == (call.function.name, call.function.arguments, "tool_calls")
    assert len(ids) == 1
    assert n_parts > 1


def test_the_stream_helper_and_typed_functions(client: Any) -> None:
    class GetWeather(pydantic.BaseModel):
        """The weather in a city."""

        city: str = pydantic.Field(max_length=6)

    tool = openai.pydantic_function_tool(GetWeather)
    asked = {**ASKED, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    parsed = client.chat.completions.parse(**asked)
    (call,) = parsed.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)
    with client.chat.completions.stream(**asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in events
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def test_a_history_of_calls_is_gone_on_with(client: Any) -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "noon"},
    ]
    answer = client.chat.completions.create(**{**ASKED, "messages": messages, "tool_choice": "none"})
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage is not None
    parts = [{"type": "text", "text": "no"}, {"type": "text", "text": "on"}]
    again = client.chat.completions.create(
        **{
            **ASKED,
            "messages": [*messages[:2], {**messages[2], "content": parts}],
            "tool_choice": "none",
        }
    )
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_functions_that_alone_may_be_called(client: Any) -> None:
    def called(choice: Any) -> set[str]:
        asked = {**ASKED, "tool_choice": choice, "parallel_tool_calls": False}
        answers = [client.chat.completions.create(**{**asked, "seed": i}) for i in range(8)]
        calls = [answer.choices[0].message.tool_calls or [] for answer in answers]
        return {call.function.name for each in calls for call in each}

    def only(*names: str, mode: str = "required") -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    assert called("required") == called(only("now", "get_weather")) == {"now", "get_weather"}
    assert called(only("now")) == {"now"}
    assert called(only("get_weather", mode="auto")) <= {"get_weather"}
    assert called("any") == {"now", "get_weather"}  # Mistral's word for "required"
    with pytest.raises(openai.BadRequestError, match="nothing"):
        called(only("now", "nothing"))


def test_schemas_that_no_grammar_holds(client: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {
            "ids": {"type": "array", "items": {"const": 1, "format": "int64"}, "uniqueItems": True},
            "where": {"enum": ["Rome"], "format": "city"},
        },
        "required": ["where"],
        "not": {"required": ["who"]},
    }
    function: dict[str, Any] = {"name": "find", "parameters": parameters}
    asked = {**ASKED, "tool_choice": "required", "parallel_tool_calls": False}
    answer = client.chat.completions.create(
        **{**asked, "tools": [{"type": "function", "function": function}]}
    )
    arguments = json.loads(answer.choices[0].message.tool_calls[0].function.arguments)
    assert arguments["where"] == "Rome"
    function["strict"] = True
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            **{**asked, "tools": [{"type": "function", "function": function}]}
        )


def test_without_functions_there_is_no_difference(client: Any) -> None:
    plain = {name: value for name, value in ASKED.items() if name != "tools"}
    answers = [
        client.chat.completions.create(**plain),
        client.chat.completions.create(**ASKED, tool_choice="none"),
        client.chat.completions.create(**{**ASKED, "tools": []}, parallel_tool_calls=True),
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]},
            "tools",
        ),
        ({"tools": FUNCTIONS[:1] * 2}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
    ],
)
def test_what_cannot_be_called_is_a_400_that_says_where(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        answer = httpx.post(server.url + CHAT, json={**ASKED, **fields, "stream": stream})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(param)


def test_clients_that_vanish_in_a_call_leave_nothing(server: Running) -> None:
    asked = {**ASKED, "tool_choice": "required", "stream": True}
    for i in range(20):
        with httpx.stream("POST", server.url + CHAT, json={**asked, "seed": i}) as answer:
            for n, _ in enumerate(answer.iter_lines()):
                if n == i % 6:
                    break
    structured = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}
    for i in range(20):
        body = {**ASKED, "tools": None, "response_format": structured, "stream": True, "max_tokens": 400}
        with httpx.stream("POST", server.url + CHAT, json={**body, "seed": i}) as answer:
            for n, _ in enumerate(answer.iter_lines()):
                if n == i % 6:
                    break
    until(lambda: is_free(server.service))
