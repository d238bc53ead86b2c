"""Usage: python trials.py URL MODEL [CLIENT...]; scripts/try_clients runs it.

Each trial is what a user of a library would write. A tiny model will not choose to call a function, so
that is required of it, and what it says is not judged: only whether the library understood the answer.
"""

import asyncio
import datetime
import decimal
import inspect
import ipaddress
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, Field

URL, MODEL = sys.argv[1:3]
BASE = f"{URL}/v1"
SECONDS = 240
TRIALS: list[tuple[str, str, str, Callable[[], Any]]] = []

HI = "Say hello."
ASK_PET = 'Invent a pet. Answer in JSON, like {"kind": "cat", "legs": 4}.'
ASK_WEATHER = "How is the weather in Rome?"
USER: Any = [{"role": "user", "content": HI}]
PET: Any = [{"role": "user", "content": ASK_PET}]
WEATHER: Any = [{"role": "user", "content": ASK_WEATHER}]


class Pet(BaseModel):
    """A pet."""

    kind: Literal["cat", "dog", "spider"]
    legs: int = Field(description="how many legs it has")


class GetWeather(BaseModel):
    """Tell the weather in a city."""

    city: Literal["Rome", "Oslo"]


FUNCTION: dict[str, Any] = {
    "name": "GetWeather",
    "description": "Tell the weather in a city.",
    "parameters": GetWeather.model_json_schema(),
}
TOOL: Any = {"type": "function", "function": FUNCTION}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "Pet", "schema": Pet.model_json_schema()},
}


class ModelError(Exception):
    """The library and the server understood each other; run.py knows it by the first two words."""


WORDS = ModelError("the model missed the fields that it was told in words alone")
CIRCLES = ModelError("the model called the function again and again")


def trial(client: str, name: str, package: str = "") -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        TRIALS.append((client, package or client, name, function))
        return function

    return add


def get_weather(city: Literal["Rome", "Oslo"]) -> str:
    """Tell the weather in a city.

    Args:
        city: where
    """
    return f"It is sunny in {city}."


def in_words(text: str) -> None:
    """Check an answer that is to be any JSON object; its fields are named in the prompt alone."""
    found = json.loads(text)
    assert isinstance(found, dict)
    if not found.keys() >= {"kind", "legs"}:
        raise WORDS


# openai


def openai_client() -> Any:
    from openai import OpenAI

    return OpenAI(base_url=BASE, api_key="none", max_retries=0)


@trial("openai", "chat")
def _() -> None:
    answer = openai_client().chat.completions.create(model="amulet", messages=USER, max_tokens=20)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens


@trial("openai", "stream")
def _() -> None:
    chunks = list(
        openai_client().chat.completions.create(
            model="amulet",
            messages=USER,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert chunks[-1].usage.completion_tokens


@trial("openai", "parse")
def _() -> None:
    answer = openai_client().chat.completions.parse(model="amulet", messages=PET, response_format=Pet)
    assert isinstance(answer.choices[0].message.parsed, Pet)


@trial("openai", "tools")
def _() -> None:
    answer = openai_client().chat.completions.create(
        model="amulet",
        messages=WEATHER,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls
    GetWeather.model_validate_json(call.function.arguments)
    messages = [
        *WEATHER,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = openai_client().chat.completions.create(model="amulet", messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


@trial("openai", "tools streamed")
def _() -> None:
    with openai_client().chat.completions.stream(
        model="amulet", messages=WEATHER, tools=[TOOL], tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    GetWeather.model_validate_json(final.choices[0].message.tool_calls[0].function.arguments)


@trial("openai", "responses")
def _() -> None:
    answer = openai_client().responses.create(model="amulet", input=HI, max_output_tokens=20)
    assert answer.output_text


@trial("openai", "responses streamed")
def _() -> None:
    with openai_client().responses.stream(model="amulet", input=HI, max_output_tokens=20) as stream:
        assert "response.output_text.delta" in [event.type for event in stream]


@trial("openai", "responses parsed")
def _() -> None:
    answer = openai_client().responses.parse(model="amulet", input=ASK_PET, text_format=Pet)
    assert isinstance(answer.output_parsed, Pet)


@trial("openai", "responses tools")
def _() -> None:
    answer = openai_client().responses.create(
        model="amulet",
        input=ASK_WEATHER,
        tools=[{"type": "function", **FUNCTION}],
        tool_choice="required",
    )
    calls = [each for each in answer.output if each.type == "function_call"]
    GetWeather.model_validate_json(calls[0].arguments)


class Rich(BaseModel):
    """What schemas are full of."""

    name: str | None = Field(max_length=4)
    born: datetime.date
    parent: Pet | GetWeather
    friends: list[Pet] = Field(min_length=1, max_length=1)
    ages: dict[Literal["a", "b"], int]
    address: ipaddress.IPv4Address
    id: uuid.UUID


class Loose(Rich):
    """What only functions without `strict` may have, at OpenAI, too."""

    days: set[Literal[1]] = Field(max_length=1)
    price: decimal.Decimal


@trial("openai", "parse of a rich model")
def _() -> None:
    answer = openai_client().chat.completions.parse(model="amulet", messages=PET, response_format=Rich)
    assert isinstance(answer.choices[0].message.parsed, Rich)


# LiteLLM


def litellm_completion(**more: Any) -> Any:
    import litellm

    return litellm.completion(model="openai/amulet", api_base=BASE, api_key="none", **more)


@trial("litellm", "chat")
def _() -> None:
    answer = litellm_completion(messages=USER, max_tokens=20)
    assert answer.choices[0].message.content


@trial("litellm", "stream")
def _() -> None:
    chunks = litellm_completion(messages=USER, max_tokens=20, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in chunks)


@trial("litellm", "response_format")
def _() -> None:
    answer = litellm_completion(messages=PET, response_format=Pet)
    Pet.model_validate_json(answer.choices[0].message.content)


@trial("litellm", "tools")
def _() -> None:
    answer = litellm_completion(messages=WEATHER, tools=[TOOL], tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    GetWeather.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)


@trial("litellm", "tools streamed")
def _() -> None:
    import litellm

    chunks = list(
        litellm_completion(messages=WEATHER, tools=[TOOL], tool_choice="required", stream=True)
    )
    answer: Any = litellm.stream_chunk_builder(chunks)
    GetWeather.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)


@trial("litellm", "anthropic's words")
def _() -> None:
    import litellm

    answer: Any = litellm.completion(
        model="anthropic/amulet",
        api_base=URL,
        api_key="none",
        messages=WEATHER,
        tools=[TOOL],
        tool_choice="required",
        max_tokens=80,
    )
    GetWeather.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)


@trial("litellm", "ollama's words")
def _() -> None:
    import litellm

    answer: Any = litellm.completion(
        model="ollama_chat/amulet", api_base=URL, messages=PET, response_format=Pet
    )
    Pet.model_validate_json(answer.choices[0].message.content)


# LangChain


def langchain_model(**more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="amulet", base_url=BASE, api_key="none", max_retries=0, **more)


@trial("langchain-openai", "invoke")
def _() -> None:
    answer = langchain_model(max_tokens=20).invoke(HI)
    assert answer.content
    assert answer.usage_metadata["output_tokens"]


@trial("langchain-openai", "stream")
def _() -> None:
    assert "".join(each.content for each in langchain_model(max_tokens=20).stream(HI))


def langchain_structured(method: str) -> None:
    found = langchain_model().with_structured_output(Pet, method=method).invoke(ASK_PET)
    assert isinstance(found, Pet)


@trial("langchain-openai", "json_schema")
def _() -> None:
    langchain_structured("json_schema")


@trial("langchain-openai", "function_calling")
def _() -> None:
    langchain_structured("function_calling")


@trial("langchain-openai", "function_calling with a loose model")
def _() -> None:
    model = langchain_model().with_structured_output(Loose, method="function_calling")
    assert isinstance(model.invoke(ASK_PET), Loose)


@trial("langchain-openai", "a call in the history")
def _() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = langchain_model(max_tokens=80)
    messages: list[Any] = [HumanMessage(ASK_WEATHER)]
    messages.append(model.bind_tools([get_weather], tool_choice="required").invoke(messages))
    calls = messages[-1].tool_calls
    messages += [ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]) for call in calls]
    assert model.invoke(messages).content


@trial("langchain-openai", "json_mode")
def _() -> None:
    model = langchain_model().with_structured_output(Pet, method="json_mode", include_raw=True)
    in_words(model.invoke(ASK_PET)["raw"].content)


@trial("langchain-openai", "bind_tools")
def _() -> None:
    answer = langchain_model().bind_tools([get_weather], tool_choice="required").invoke(ASK_WEATHER)
    assert answer.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")


@trial("langchain-openai", "bind_tools streamed")
def _() -> None:
    model = langchain_model().bind_tools([get_weather], tool_choice="get_weather")
    chunks = list(model.stream(ASK_WEATHER))
    whole = chunks[0]
    for each in chunks[1:]:
        whole += each
    assert whole.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")


@trial("langchain-openai", "responses")
def _() -> None:
    model = langchain_model(use_responses_api=True)
    assert model.invoke(HI).text
    assert isinstance(model.with_structured_output(Pet).invoke(ASK_PET), Pet)
    answer = model.bind_tools([get_weather], tool_choice="required").invoke(ASK_WEATHER)
    assert answer.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")


# LlamaIndex


def llama_index_model(max_tokens: int = 80) -> Any:
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model="amulet",
        api_base=BASE,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=max_tokens,
    )


@trial("llama-index", "complete", "llama-index-llms-openai-like")
def _() -> None:
    assert llama_index_model(20).complete(HI).text


@trial("llama-index", "chat", "llama-index-llms-openai-like")
def _() -> None:
    from llama_index.core.llms import ChatMessage

    assert llama_index_model(20).chat([ChatMessage(role="user", content=HI)]).message.content


@trial("llama-index", "stream", "llama-index-llms-openai-like")
def _() -> None:
    assert "".join(each.delta or "" for each in llama_index_model(20).stream_complete(HI))


@trial("llama-index", "structured", "llama-index-llms-openai-like")
def _() -> None:
    assert isinstance(llama_index_model().as_structured_llm(Pet).complete(ASK_PET).raw, Pet)


@trial("llama-index", "complete without chat", "llama-index-llms-openai-like")
def _() -> None:
    model = llama_index_model(20)
    model.is_chat_model = False
    assert "".join(each.delta or "" for each in model.stream_complete("Once upon a time"))


@trial("llama-index", "tools", "llama-index-llms-openai-like")
def _() -> None:
    from llama_index.core.tools import FunctionTool

    tool = FunctionTool.from_defaults(get_weather)
    model = llama_index_model()
    answer = model.chat_with_tools([tool], user_msg=ASK_WEATHER, tool_required=True)
    (call, *_) = model.get_tool_calls_from_response(answer)
    assert call.tool_kwargs["city"] in ("Rome", "Oslo")


@trial("llama-index", "tools streamed", "llama-index-llms-openai-like")
def _() -> None:
    from llama_index.core.tools import FunctionTool

    # Not stream_structured_predict: it leaves to the model whether it calls.
    tool, model = FunctionTool.from_defaults(get_weather), llama_index_model()
    *_, last = model.stream_chat_with_tools([tool], user_msg=ASK_WEATHER, tool_required=True)
    (call, *_) = model.get_tool_calls_from_response(last)
    assert call.tool_kwargs["city"] in ("Rome", "Oslo")


# Pydantic AI


def pydantic_agent(**more: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("amulet", provider=OpenAIProvider(base_url=BASE, api_key="none"))
    return Agent(model, model_settings={"max_tokens": 80}, retries=0, **more)


@trial("pydantic-ai", "text", "pydantic-ai-slim")
def _() -> None:
    assert pydantic_agent().run_sync(HI).output


@trial("pydantic-ai", "stream", "pydantic-ai-slim")
async def _() -> None:
    async with pydantic_agent().run_stream(HI) as answer:
        assert "".join([each async for each in answer.stream_text(delta=True)])


@trial("pydantic-ai", "structured as a tool", "pydantic-ai-slim")
def _() -> None:
    assert isinstance(pydantic_agent(output_type=Pet).run_sync(ASK_PET).output, Pet)


@trial("pydantic-ai", "structured streamed", "pydantic-ai-slim")
async def _() -> None:
    async with pydantic_agent(output_type=Pet).run_stream(ASK_PET) as answer:
        assert isinstance(await answer.get_output(), Pet)


@trial("pydantic-ai", "native", "pydantic-ai-slim")
def _() -> None:
    from pydantic_ai import NativeOutput

    assert isinstance(pydantic_agent(output_type=NativeOutput(Pet)).run_sync(ASK_PET).output, Pet)


@trial("pydantic-ai", "prompted", "pydantic-ai-slim")
def _() -> None:
    from pydantic_ai import PromptedOutput, UnexpectedModelBehavior, capture_run_messages

    with capture_run_messages() as messages:
        try:
            pydantic_agent(output_type=PromptedOutput(Pet)).run_sync(ASK_PET)
        except UnexpectedModelBehavior:
            in_words(messages[1].parts[0].content)
            raise WORDS from None


@trial("pydantic-ai", "a tool", "pydantic-ai-slim")
def _() -> None:
    # An output function is one that has to be called; others are called as the model likes.
    agent = pydantic_agent(output_type=get_weather)
    assert agent.run_sync(ASK_WEATHER).output.startswith("It is sunny in")


@trial("pydantic-ai", "a tool and an answer", "pydantic-ai-slim")
def _() -> None:
    from pydantic_ai import UnexpectedModelBehavior, capture_run_messages

    with capture_run_messages() as messages:
        try:
            assert pydantic_agent(tools=[get_weather]).run_sync(ASK_WEATHER).output
        except UnexpectedModelBehavior:
            assert [part.part_kind for each in messages for part in each.parts].count("tool-return") > 1
            raise CIRCLES from None


@trial("pydantic-ai", "responses", "pydantic-ai-slim")
def _() -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIResponsesModel("amulet", provider=OpenAIProvider(base_url=BASE, api_key="none"))
    assert isinstance(Agent(model, output_type=Pet, retries=0).run_sync(ASK_PET).output, Pet)


# Instructor


def instructor_pet(mode: str) -> None:
    import instructor

    client = instructor.from_openai(openai_client(), mode=getattr(instructor.Mode, mode))
    found = client.chat.completions.create(
        model="amulet", messages=PET, response_model=Pet, max_retries=1
    )
    assert isinstance(found, Pet)


@trial("instructor", "TOOLS")
def _() -> None:
    instructor_pet("TOOLS")


@trial("instructor", "JSON")
def _() -> None:
    from instructor.core import InstructorRetryException

    try:
        instructor_pet("JSON")
    except InstructorRetryException as error:
        in_words(error.last_completion.choices[0].message.content)
        raise WORDS from None


@trial("instructor", "partial")
def _() -> None:
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode.TOOLS)
    parts = client.chat.completions.create_partial(model="amulet", messages=PET, response_model=Pet)
    assert list(parts)[-1].legs is not None


@trial("instructor", "JSON_SCHEMA")
def _() -> None:
    instructor_pet("JSON_SCHEMA")


# Haystack


def haystack_reply(text: str, settings: dict[str, Any], **more: Any) -> Any:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    generator = OpenAIChatGenerator(
        api_key=Secret.from_token("none"),
        api_base_url=BASE,
        model="amulet",
        generation_kwargs=settings,
        **more,
    )
    (reply,) = generator.run([ChatMessage.from_user(text)])["replies"]
    return reply


@trial("haystack", "chat", "haystack-ai")
def _() -> None:
    assert haystack_reply(HI, {"max_tokens": 20}).text


@trial("haystack", "stream", "haystack-ai")
def _() -> None:
    pieces: list[str] = []
    reply = haystack_reply(
        HI, {"max_tokens": 20}, streaming_callback=lambda each: pieces.append(each.content)
    )
    assert "".join(pieces) == reply.text


@trial("haystack", "response_format", "haystack-ai")
def _() -> None:
    Pet.model_validate_json(haystack_reply(ASK_PET, {"response_format": Pet}).text)


def haystack_tools(**more: Any) -> None:
    from haystack.tools import Tool

    tool = Tool("get_weather", "The weather", GetWeather.model_json_schema(), get_weather)
    reply = haystack_reply(ASK_WEATHER, {"tool_choice": "required"}, tools=[tool], **more)
    assert reply.tool_calls[0].arguments["city"] in ("Rome", "Oslo")


@trial("haystack", "tools", "haystack-ai")
def _() -> None:
    haystack_tools()


@trial("haystack", "Agent", "haystack-ai")
def _() -> None:
    from haystack.components.agents import Agent
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import create_tool_from_function
    from haystack.utils import Secret

    generator = OpenAIChatGenerator(
        api_key=Secret.from_token("none"),
        api_base_url=BASE,
        model="amulet",
        generation_kwargs={"tool_choice": "required"},
    )
    tool = create_tool_from_function(get_weather)
    helper = Agent(chat_generator=generator, tools=[tool], max_agent_steps=2)
    messages = helper.run([ChatMessage.from_user(ASK_WEATHER)])["messages"]
    assert len([each for each in messages if each.tool_call_results]) >= 2


@trial("haystack", "tools streamed", "haystack-ai")
def _() -> None:
    haystack_tools(streaming_callback=lambda each: None)


# OpenAI's agents


def agent(**more: Any) -> Any:
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=BASE, api_key="none", max_retries=0)
    settings = ModelSettings(max_tokens=60, tool_choice="required" if "tools" in more else None)
    model = OpenAIChatCompletionsModel(model="amulet", openai_client=client)
    return Agent(name="Helper", model=model, model_settings=settings, **more)


@trial("openai-agents", "text")
def _() -> None:
    from agents import Runner

    assert Runner.run_sync(agent(), HI).final_output


@trial("openai-agents", "structured")
def _() -> None:
    from agents import Runner

    assert isinstance(Runner.run_sync(agent(output_type=Pet), ASK_PET).final_output, Pet)


@trial("openai-agents", "a tool")
def _() -> None:
    from agents import Runner, function_tool

    helper = agent(tools=[function_tool(get_weather)], tool_use_behavior="stop_on_first_tool")
    answer = Runner.run_sync(helper, ASK_WEATHER)
    assert answer.final_output.startswith("It is sunny in")


def agent_answers(helper: Any) -> None:
    from agents import MaxTurnsExceeded, Runner

    try:
        answer = Runner.run_sync(helper, ASK_WEATHER, max_turns=4)
    except MaxTurnsExceeded as error:
        raise CIRCLES if "function_call_output" in str(error.run_data.new_items) else error from None
    assert "function_call_output" in [each.get("type") for each in answer.to_input_list()]
    assert answer.final_output


@trial("openai-agents", "a tool and an answer")
def _() -> None:
    from agents import function_tool

    agent_answers(agent(tools=[function_tool(get_weather)]))


@trial("openai-agents", "a tool streamed")
async def _() -> None:
    from agents import Runner, function_tool

    helper = agent(tools=[function_tool(get_weather)], tool_use_behavior="stop_on_first_tool")
    answer = Runner.run_streamed(helper, ASK_WEATHER)
    assert [each async for each in answer.stream_events()]
    assert answer.final_output.startswith("It is sunny in")


@trial("openai-agents", "responses")
def _() -> None:
    from agents import OpenAIResponsesModel, function_tool
    from openai import AsyncOpenAI

    helper = agent(tools=[function_tool(get_weather)])
    client = AsyncOpenAI(base_url=BASE, api_key="none", max_retries=0)
    helper.model = OpenAIResponsesModel(model="amulet", openai_client=client)
    agent_answers(helper)


# smolagents


def smolagents_model() -> Any:
    from smolagents import OpenAIServerModel

    return OpenAIServerModel("amulet", api_base=BASE, api_key="none", max_tokens=80)


@trial("smolagents", "generate")
def _() -> None:
    content = [{"type": "text", "text": HI}]
    assert smolagents_model().generate([{"role": "user", "content": content}]).content


@trial("smolagents", "stream")
def _() -> None:
    pieces = smolagents_model().generate_stream(USER)
    assert "".join(each.content or "" for each in pieces)


@trial("smolagents", "response_format")
def _() -> None:
    Pet.model_validate_json(smolagents_model().generate(PET, response_format=SCHEMA).content)


@trial("smolagents", "ToolCallingAgent")
def _() -> None:
    from smolagents import ActionStep, LogLevel, ToolCallingAgent, tool

    helper = ToolCallingAgent(
        tools=[tool(get_weather)], model=smolagents_model(), verbosity_level=LogLevel.OFF
    )
    steps = helper.run(ASK_WEATHER, stream=True, max_steps=2)
    for step in [each for each in steps if isinstance(each, ActionStep)][:2]:
        assert step.tool_calls, step.error


# anthropic


def anthropic_client() -> Any:
    from anthropic import Anthropic

    return Anthropic(base_url=URL, api_key="none", max_retries=0)


@trial("anthropic", "messages")
def _() -> None:
    answer = anthropic_client().messages.create(model="amulet", messages=USER, max_tokens=20)
    assert answer.content[0].text


@trial("anthropic", "stream")
def _() -> None:
    with anthropic_client().messages.stream(model="amulet", messages=USER, max_tokens=20) as stream:
        assert "".join(stream.text_stream)


@trial("anthropic", "tools")
def _() -> None:
    tool = {
        "name": "GetWeather",
        "description": "The weather",
        "input_schema": GetWeather.model_json_schema(),
    }
    answer = anthropic_client().messages.create(
        model="amulet", messages=WEATHER, max_tokens=80, tools=[tool], tool_choice={"type": "any"}
    )
    GetWeather.model_validate(answer.content[-1].input)


# ollama


def ollama_client() -> Any:
    from ollama import Client

    return Client(host=URL)


@trial("ollama", "chat")
def _() -> None:
    answer = ollama_client().chat("amulet", USER, options={"num_predict": 20})
    assert answer.message.content


@trial("ollama", "stream")
def _() -> None:
    pieces = ollama_client().chat("amulet", USER, stream=True, options={"num_predict": 20})
    assert "".join(each.message.content or "" for each in pieces)


@trial("ollama", "generate")
def _() -> None:
    assert ollama_client().generate("amulet", HI, options={"num_predict": 20}).response


@trial("ollama", "format")
def _() -> None:
    answer = ollama_client().chat("amulet", PET, format=Pet.model_json_schema())
    Pet.model_validate_json(answer.message.content)


@trial("ollama", "tools")
def _() -> None:
    assert ollama_client().chat("amulet", WEATHER, tools=[TOOL], options={"num_predict": 60}).message


# llm, without the server


@trial("llm", "schema")
def _() -> None:
    options = ["-o", "max_tokens", "80", *(["-o", "model", MODEL] if MODEL else [])]
    schema = json.dumps(Pet.model_json_schema())
    done = subprocess.run(
        [
            os.environ["AMULET_PYTHON"],
            "-m",
            "llm",
            "-m",
            "amulet",
            "--no-log",
            *options,
            "--schema",
            schema,
            ASK_PET,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    Pet.model_validate_json(done.stdout)


def reason(error: BaseException) -> str:
    """Return why a trial failed, in one line."""
    if isinstance(error, ModelError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def version_of(package: str) -> str:
    """Return the version of a library; of llm it is the one that runs amulet in its own process."""
    if package != "llm":
        return version(package)
    command = [os.environ["AMULET_PYTHON"], "-m", "llm", "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()[-1]


def too_long(*_: Any) -> None:
    raise TimeoutError(f"it took more than {SECONDS} seconds")


def main() -> None:
    only = sys.argv[3:]
    signal.signal(signal.SIGALRM, too_long)
    for client, package, name, function in TRIALS:
        if only and client not in only:
            continue
        found = "passed"
        signal.alarm(SECONDS)
        try:
            asyncio.run(function()) if inspect.iscoroutinefunction(function) else function()
        except Exception as error:
            found = reason(error)
        signal.alarm(0)
        about = {"client": client, "version": version_of(package), "trial": name, "result": found}
        print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
