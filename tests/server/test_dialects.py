"""Other programs' APIs: the same answers as chat completions give, in their words."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pydantic
import pytest
from fixture_types import Tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Running, is_free, serving, until

from amulet_gguf.engine.answer import Answer, CallPart, Piece, Timings, Usage
from amulet_gguf.prompts.sandbox import CHATML
from amulet_gguf.server import streaming
from amulet_gguf.server.guard import Access
from amulet_gguf.server.ollama import OllamaReply
from amulet_gguf.service.service import AmuletService

CHAT = "/v1/chat/completions"
HI: Any = [{"role": "user", "content": "How are you?"}]
TALK: Any = [
    {"role": "system", "content": "Be kind."},
    *HI,
    {"role": "assistant", "content": "Well."},
    {"role": "user", "content": "And now?"},
]
CHANCE: dict[str, Any] = {"seed": 3, "temperature": 0.8}
ASKED: dict[str, Any] = {"messages": HI, "max_tokens": 12, **CHANCE}
OPTIONS: dict[str, Any] = {"num_predict": 12, **CHANCE}
#: A streamed request to each endpoint that streams.
STREAMS: dict[str, dict[str, Any]] = {
    CHAT: ASKED,
    "/v1/responses": {"input": "How are you?", "max_output_tokens": 12, **CHANCE},
    "/v1/messages": ASKED,
    "/api/chat": {"model": "llama", "messages": HI, "options": OPTIONS},
    "/api/generate": {"model": "llama", "prompt": "How are you?", "options": OPTIONS},
    "/completion": {"prompt": "<|im_start|>user\nHow are you?", "n_predict": 12, **CHANCE},
}
OTHERS = (
    "/v1/responses/input_tokens", "/v1/messages/count_tokens", "/v1/chat/completions/input_tokens",
    "/api/show", "/tokenize", "/detokenize", "/apply-template",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Running]:
    with serving(tiny("llama")) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
    until(lambda: is_free(server.service))


@pytest.fixture(scope="module")
def nonsense(tiny: Tiny) -> Iterator[httpx.Client]:
    with serving(tiny("llama"), max_tokens=3) as running:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            yield client
        until(lambda: is_free(running.service))


@pytest.fixture(scope="module")
def thinking(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(CHATML.replace("assistant\n", "assistant\n<think>\n"), "utf-8")
    with serving(tiny("llama"), chat_template=template) as running:
        yield running


@pytest.fixture(scope="module")
def openai_client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
def llama(server: Running) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as client:
        yield client


def ask(http: httpx.Client, path: str, body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(http: httpx.Client, **more: Any) -> str:
    return str(ask(http, CHAT, {**ASKED, **more})["choices"][0]["message"]["content"])


# OpenAI's Responses


def test_a_response_is_the_answer_of_a_chat(openai_client: openai.OpenAI, http: httpx.Client) -> None:
    responses = openai_client.responses
    whole = responses.create(
        model="gpt-4.1",
        input="How are you?",
        max_output_tokens=12,
        extra_body={"seed": 3},
        temperature=0.8,
    )
    assert whole.output_text == said(http)
    assert whole.id.startswith("resp_")
    assert whole.output[0].id
    assert whole.output[0].id.startswith("msg_")
    assert (whole.status, whole.model) == ("incomplete", "llama")
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + 12
    talk = responses.create(
        model="gpt-4.1",
        instructions="Be kind.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "How are you?"}]},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Well.", "annotations": []}],
            },
            {"role": "user", "content": "And now?"},
        ],
        max_output_tokens=12,
        temperature=0.8,
        store=True,
        extra_body={"seed": 3},
    )
    assert talk.output_text == said(http, messages=TALK)
    counted = ask(http, "/v1/responses/input_tokens", {"model": "x", "input": "How are you?"})
    assert counted["input_tokens"] == whole.usage.input_tokens


def test_a_response_is_streamed_in_typed_events(
    openai_client: openai.OpenAI, http: httpx.Client
) -> None:
    asked: Any = {"model": "x", "input": HI, "max_output_tokens": 12, "temperature": 0.8}
    events = list(openai_client.responses.create(**asked, stream=True, extra_body={"seed": 3}))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for kind in kinds if not kind.endswith("delta")] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
        "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert text == said(http) == last.response.output_text
    ids = {event.item_id for event in events if "item_id" in type(event).model_fields}
    assert ids == {last.response.output[0].id}
    assert {event.response.id for event in events if hasattr(event, "response")} == {last.response.id}
    assert last.response.usage.output_tokens == 12


class Pet(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    legs: int = pydantic.Field(ge=0, le=8)


def test_responses_obey_schemas(openai_client: openai.OpenAI) -> None:
    asked: Any = {"model": "x", "input": "A cat", "max_output_tokens": 60, "temperature": 0.7}
    parsed = openai_client.responses.parse(**asked, text_format=Pet, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Pet)
    with openai_client.responses.stream(**asked, text_format=Pet, extra_body={"seed": 1}) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    assert final.status == "completed"
    free = openai_client.responses.create(**asked, text={"format": {"type": "json_object"}})
    assert free.output_text.startswith("{")


def test_responses_say_that_nothing_is_kept(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="keeps no responses") as refused:
        openai_client.responses.create(model="x", input="Hi", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve("resp_1")


# Anthropic's Messages


def message(claude: anthropic.Anthropic, **more: Any) -> anthropic.types.Message:
    asked: Any = {"model": "x", "max_tokens": 12, "messages": HI, **more}
    found: anthropic.types.Message = claude.messages.create(**asked, extra_body=CHANCE)
    return found


def text_of(found: Any) -> str:
    return "".join(block.text for block in found.content if block.type == "text")


def test_a_message_is_the_answer_of_a_chat(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    whole = message(claude)
    assert text_of(whole) == said(http)
    assert (whole.stop_reason, whole.stop_sequence) == ("max_tokens", None)
    counted = claude.messages.count_tokens(model="x", messages=HI).input_tokens
    usage = whole.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    assert usage.output_tokens == 12
    blocks = [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?"}]
    assert text_of(message(claude, messages=[{"role": "user", "content": blocks}])) == said(http)
    kind = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    for system in ("Be kind.", kind):
        assert text_of(message(claude, system=system, messages=TALK[1:])) == said(http, messages=TALK)
    begun = [*HI, {"role": "assistant", "content": "So"}]
    assert text_of(message(claude, messages=begun)) == said(http, messages=begun)


def test_a_message_is_streamed_in_blocks(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    asked: Any = {"model": "x", "max_tokens": 12, "messages": HI}
    with claude.messages.stream(**asked, extra_body=CHANCE) as stream:
        kinds = [event.type for event in stream if event.type not in ("text", "content_block_delta")]
        final = stream.get_final_message()
    assert kinds == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert (text_of(final), final.stop_reason) == (said(http), "max_tokens")
    assert final.usage.output_tokens == 12


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_stop_sequence_is_told(
    claude: anthropic.Anthropic, http: httpx.Client, is_streamed: bool
) -> None:
    text = said(http)
    stop = text[5:8]
    asked: Any = {"model": "x", "max_tokens": 12, "messages": HI, "stop_sequences": ["never", stop]}
    found: Any
    if is_streamed:
        with claude.messages.stream(**asked, extra_body=CHANCE) as stream:
            found = stream.get_final_message()
    else:
        found = claude.messages.create(**asked, extra_body=CHANCE)
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert text_of(found) == text[: text.index(stop)]
    ended = ask(http, "/completion", {**STREAMS["/completion"], "regex": "ab", "n_predict": 9})
    assert (ended["stop_type"], ended["stopping_word"], ended["content"]) == ("eos", "", "ab")


def test_messages_obey_schemas(claude: anthropic.Anthropic) -> None:
    form = {"type": "json_schema", "schema": Pet.model_json_schema()}
    more = {**CHANCE, "output_config": {"format": form, "effort": "low"}}
    found = claude.messages.create(model="x", max_tokens=60, messages=HI, extra_body=more)
    Pet.model_validate_json(text_of(found))


def test_errors_of_messages_are_anthropics(claude: anthropic.Anthropic, tiny: Tiny) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
    with pytest.raises(anthropic.BadRequestError, match="image input is not supported") as refused:
        message(claude, messages=[{"role": "user", "content": [image]}])
    body: Any = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    with pytest.raises(anthropic.NotFoundError):
        message(claude, model="x:nobody")
    with (
        serving(tiny("llama"), Access(api_key="sesame")) as running,
        anthropic.Anthropic(base_url=running.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        message(stranger)


# ollama's


def test_ollama_gives_the_answer_of_a_chat(llama: ollama.Client, http: httpx.Client) -> None:
    whole = llama.chat("llama3.2:latest", TALK, options=OPTIONS)
    assert whole.message.content == said(http, messages=TALK)
    assert (whole.model, whole.done, whole.done_reason) == ("llama:latest", True, "length")
    assert whole.eval_count == 12
    assert whole.prompt_eval_count
    assert whole.total_duration
    assert whole.eval_duration
    assert 0 < whole.eval_duration < whole.total_duration
    chunks = list(llama.chat("llama", TALK, options=OPTIONS, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == 12
    once = llama.generate("llama", "How are you?", options=OPTIONS)
    assert once.response == said(http)
    kind = llama.generate("llama", "How are you?", system="Be kind.", options=OPTIONS, stream=True)
    assert "".join(chunk.response or "" for chunk in kind) == said(http, messages=TALK[:2])
    raw = llama.generate("llama", "<|im_start|>user\nHow are you?", raw=True, options=OPTIONS)
    assert raw.response == ask(http, "/completion", STREAMS["/completion"])["content"]


def test_options_of_this_project_in_ollamas(llama: ollama.Client, http: httpx.Client) -> None:
    steered = said(http, prefer=["concise", "formal:0.5"], strength=4.0)
    assert steered != said(http)
    options = {**OPTIONS, "prefer": ["concise", "formal:0.5"], "strength": 4.0, "num_ctx": 99}
    assert llama.chat("llama", HI, options=options, keep_alive="5m").message.content == steered
    assert llama.chat("llama:concise", HI, options=OPTIONS).message.content == said(
        http, prefer="concise"
    )


def test_ollama_obeys_schemas(llama: ollama.Client) -> None:
    options = {**OPTIONS, "num_predict": 60}
    found = llama.chat("llama", HI, format=Pet.model_json_schema(), options=options)
    Pet.model_validate_json(found.message.content or "")
    assert (llama.generate("llama", "x", format="json", options=OPTIONS).response or "")[0] == "{"


def test_what_ollama_tells_of_models(llama: ollama.Client) -> None:
    models = llama.list().models
    assert models[0].model == "llama:latest"
    assert "llama:concise" in {each.model for each in models}
    assert models[0].size
    assert llama.ps().models[0].model == "llama:latest"
    shown = llama.show("llama")
    assert shown.modelinfo
    assert shown.modelinfo["llama.context_length"] == 2048
    assert shown.capabilities == ["completion", "tools"]
    assert llama.generate("llama").done_reason == "load"
    with pytest.raises(ollama.ResponseError) as refused:
        llama.show("llama:nobody")
    assert refused.value.status_code == 404


# llama.cpp's


def test_a_rendered_prompt_is_answered_as_its_conversation(http: httpx.Client) -> None:
    prompt = ask(http, "/apply-template", {"messages": TALK})["prompt"]
    assert "<|im_start|>user\nAnd now?<|im_end|>" in prompt
    asked = {"prompt": prompt, "n_predict": 12, **CHANCE}
    whole = ask(http, "/completion", {**asked, "return_tokens": True})
    assert whole["content"] == said(http, messages=TALK)
    counted = ask(http, "/v1/chat/completions/input_tokens", {"messages": TALK})["input_tokens"]
    assert whole["tokens_evaluated"] == whole["timings"]["prompt_n"] == counted
    assert whole["tokens_predicted"] == len(whole["tokens"]) == 12
    assert (whole["stop_type"], whole["truncated"]) == ("limit", False)
    assert whole["generation_settings"]["n_predict"] == 12
    tokens = ask(http, "/tokenize", {"content": prompt, "add_special": True})["tokens"]
    assert len(tokens) == counted
    assert ask(http, "/detokenize", {"tokens": tokens})["content"] == whole["prompt"] == f"<s>{prompt}"
    mixed = [*tokens[:5], ask(http, "/detokenize", {"tokens": tokens[5:]})["content"]]
    several = [prompt, tokens, {"prompt_string": prompt}, mixed]
    found = ask(http, "/completion", {**asked, "prompt": several})
    assert [each["content"] for each in found] == [whole["content"]] * 4
    assert [each["index"] for each in found] == [0, 1, 2, 3]
    chosen = ask(
        http, "/completion", {**asked, "response_fields": ["content", "generation_settings/seed"]}
    )
    assert chosen == {"content": whole["content"], "generation_settings/seed": 3}


def test_a_completion_is_streamed_token_by_token(http: httpx.Client) -> None:
    asked = {**STREAMS["/completion"], "n_probs": 3, "prompt": ["Once", "Twice"]}
    whole = ask(http, "/completion", asked)
    lines = http.post("/completion", json={**asked, "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line]
    for index, each in enumerate(whole):
        mine = [event for event in events if event["index"] == index]
        assert [event["stop"] for event in mine] == [False] * (len(mine) - 1) + [True]
        assert "".join(event["content"] for event in mine) == each["content"]
        told = [entry for event in mine[:-1] for entry in event["completion_probabilities"]]
        tokens = [entry["id"] for entry in each["completion_probabilities"]]
        assert [entry["id"] for entry in told] == tokens
        assert len(told) == each["tokens_predicted"]
        assert all(len(entry["top_logprobs"]) == 3 for entry in told)
        assert mine[-1]["stop_type"] == each["stop_type"]


def test_tokens_and_their_texts(http: httpx.Client) -> None:
    text = "é 🤗 <|im_end|>"
    tokens = ask(http, "/tokenize", {"content": text})["tokens"]
    pieces = ask(http, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    data = b"".join(
        p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces
    )
    assert data.decode() == text == ask(http, "/detokenize", {"tokens": tokens})["content"]
    assert pieces[-1]["piece"] == "<|im_end|>"
    plain = ask(http, "/tokenize", {"content": text, "parse_special": False})["tokens"]
    assert len(plain) > len(tokens)


def test_preferences_stand_before_raw_prompts(http: httpx.Client) -> None:
    wanted = "Be as brief as you can."

    def tokens_of(text: str, **more: Any) -> list[int]:
        found: list[int] = ask(http, "/tokenize", {"content": text, **more})["tokens"]
        return found

    asked = STREAMS["/completion"]
    first, *others = tokens_of(asked["prompt"], add_special=True)
    prompted = {**asked, "prompt": [first, *tokens_of(f"{wanted}\n\n"), *others]}
    for prompt in (asked["prompt"], [first, *others]):
        steered = ask(http, "/completion", {**asked, "prompt": prompt, "prefer": wanted, "strength": 1})
        assert steered["content"] == ask(http, "/completion", prompted)["content"]


def test_what_llamacpp_tells_of_itself(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert props["total_slots"] == len(http.get("/slots").json()) == 4
    assert "im_start" in props["chat_template"]
    assert props["model_path"] == "llama.gguf"
    monkeypatch.setattr(AmuletService, "n_live", 3)
    assert [slot["is_processing"] for slot in http.get("/slots").json()] == [True] * 3 + [False]
    monkeypatch.undo()


# All of them


def test_thoughts_in_every_dialect(thinking: Running) -> None:
    with httpx.Client(base_url=thinking.url, timeout=30) as http:
        more = {"think_tokens": 8, **CHANCE}
        chat = ask(http, CHAT, {"messages": HI, "max_tokens": 6, **more})["choices"][0]["message"]
        thought, text = chat["reasoning_content"], chat["content"]
        assert thought
        assert text
        with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="x") as client:
            asked: Any = {"model": "x", "input": HI, "max_output_tokens": 6, "extra_body": more}
            output: Any = client.responses.create(**asked).output
            with client.responses.stream(**asked) as stream:
                last: Any = list(stream)[-1]
        for found in (output, last.response.output):
            assert [item.type for item in found] == ["reasoning", "message"]
            assert found[0].content[0].text.strip() == thought
            assert found[1].content[0].text == text
        with anthropic.Anthropic(base_url=thinking.url, api_key="x") as claude:
            asked = {"model": "x", "messages": HI, "max_tokens": 6, "extra_body": CHANCE}
            asked["thinking"] = {"type": "enabled", "budget_tokens": 8}
            with claude.messages.stream(**asked) as messages:
                streamed: Any = messages.get_final_message().content
            content: Any = claude.messages.create(**asked).content
            quick: Any = claude.messages.create(**{**asked, "thinking": {"type": "disabled"}}).content
            again = [
                *HI,
                {"role": "assistant", "content": content},
                {"role": "user", "content": "Go on"},
            ]
            assert claude.messages.create(**{**asked, "messages": again}).content
        for found in (content, streamed):
            assert [block.type for block in found] == ["thinking", "text"]
            assert (found[0].thinking.strip(), found[1].text) == (thought, text)
        assert [block.type for block in quick] == ["text"]
        with ollama.Client(thinking.url) as llama:
            options = {"num_predict": 6, **more}
            whole = llama.chat("x", HI, think=True, options=options).message
            assert (whole.thinking, whole.content) == (thought, text)
            chunks = list(llama.chat("x", HI, options=options, stream=True))
            assert "".join(chunk.message.thinking or "" for chunk in chunks).strip() == thought
            assert llama.chat("x", HI, think=False, options=options).message.thinking is None
            assert llama.show("x").capabilities == ["completion", "tools", "thinking"]


def error_in(path: str, answer: httpx.Response) -> str:
    """The message of an error, which has the form of the path's dialect."""
    body = answer.json()
    if path.startswith("/api/"):
        assert set(body) == {"error"}
        return str(body["error"])
    if "/messages" in path:
        assert set(body) == {"type", "error"}
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
    else:
        assert body["error"]["type"] in ("invalid_request_error", "exceed_context_size_error")
    return str(body["error"]["message"])


IMAGE = {"type": "input_image", "image_url": "x"}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f", "parameters": {}}
BAD: list[tuple[str, Any]] = [
    *((path, {**body, "strenght": 3}) for path, body in STREAMS.items()),
    *((path, {**body, "model": "llama:nobody"}) for path, body in STREAMS.items()),
    *((path, {**body, "temperature": "hot"}) for path, body in STREAMS.items()),
    *((path, {**body, "prefer": ["x y"] * 9}) for path, body in STREAMS.items()),
    *(
        (path, {**body, "tools": [{"type": "nothing"}]})
        for path, body in STREAMS.items()
        if path != CHAT
    ),
    *((path, [1]) for path in STREAMS),
    *((path, [1]) for path in OTHERS),
    ("/v1/responses", {"input": [{"role": "user", "content": [IMAGE]}]}),
    ("/v1/responses", {"input": "word " * 2000}),
    ("/v1/responses", {"input": []}),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "1"}]}),
    ("/v1/responses", {"input": [*HI, {**CALL, "arguments": "{"}]}),
    ("/v1/responses", {"input": "x", "background": True}),
    ("/v1/responses", {"input": "x", "reasoning": {"effort": "heroic"}}),
    ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}),
    ("/v1/responses", {"input": "x", "include": ["message.output_text.logprobs"]}),
    ("/v1/messages", {"messages": HI}),
    ("/v1/messages", {**ASKED, "messages": []}),
    ("/v1/messages", {**ASKED, "max_tokens": 0}),
    ("/v1/messages", {**ASKED, "messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
    ("/v1/messages", {**ASKED, "messages": [{"role": "robot", "content": "x"}]}),
    ("/v1/messages", {**ASKED, "messages": [*HI, {"role": "assistant", "content": [{}]}]}),
    ("/v1/messages", {**ASKED, "thinking": {"type": "deep"}}),
    ("/v1/messages", {**ASKED, "thinking": {"type": "enabled", "budget_tokens": "x"}}),
    ("/v1/messages", {**ASKED, "stop_sequences": ["x"] * 20_000}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user"}]}),
    ("/api/chat", {"messages": HI}),
    ("/api/chat", {"model": "llama", "messages": [{"role": "user", "content": "x", "images": ["x"]}]}),
    ("/api/chat", {"model": "llama", "messages": HI, "options": {"mirostat": 2}}),
    ("/api/chat", {"model": "llama", "messages": HI, "format": "yaml"}),
    ("/api/chat", {"model": "llama", "messages": HI, "think": "heroic"}),
    ("/api/generate", {"model": "llama", "prompt": "x", "context": [1, 2]}),
    ("/api/generate", {"model": "llama", "prompt": "x", "suffix": "y"}),
    ("/completion", {"prompt": []}),
    ("/completion", {"prompt": [1, 999999]}),
    ("/completion", {"prompt": [1, -1]}),
    ("/completion", {"prompt": [True]}),
    ("/completion", {"prompt": [["x"]] * 17}),
    ("/completion", {"prompt": ["x"] * 16, "n_cmpl": 2}),
    ("/completion", {"prompt": {"prompt_string": "x", "multimodal_data": ["x"]}}),
    ("/completion", {"prompt": "x " * 2000}),
    ("/completion", {"prompt": "x", "n_probs": 101}),
    ("/detokenize", {"tokens": [10**30]}),
    ("/detokenize", {"tokens": ["x"]}),
    ("/tokenize", {"content": [10**30], "with_pieces": True}),
    ("/tokenize", {}),
    ("/tokenize", {"content": [5] * 300_000}),
    ("/detokenize", {"tokens": [5] * 300_000}),
    ("/completion", {"prompt": [5] * 300_000}),
    ("/v1/messages/batches", {}),
    ("/apply-template", {"messages": []}),
    ("/apply-template", {"messages": HI, "tools": [{"type": "nothing"}]}),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_errors_have_the_form_of_their_dialect(http: httpx.Client, number: int) -> None:
    path, body = BAD[number]
    for stream in (False, True):
        streamed = {**body, "stream": stream} if isinstance(body, dict) else body
        answer = http.post(path, json=streamed if path in STREAMS else body)
        assert 400 <= answer.status_code < 500, answer.text
        message = error_in(path, answer)
        assert message
        assert "\n" not in message


NAMES = (
    "messages", "role", "content", "input", "instructions", "text", "format", "type", "system",
    "thinking", "tools", "tool_choice", "model", "prompt", "options", "stop", "tokens", "images",
    "reasoning", "call_id", "budget_tokens", "effort", "tool_calls", "function", "stop_sequences",
)  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(NAMES),
                inner | st.sampled_from(["user", "text", "message", "llama", "function_call"]),
                max_size=6,
            )
        ),
        max_leaves=14,
    )
)
def test_nonsense_is_refused_without_a_server_error(nonsense: httpx.Client, body: Any) -> None:
    for path in (*STREAMS, *OTHERS):
        known = {**STREAMS[path], **body} if isinstance(body, dict) and path in STREAMS else body
        answer = nonsense.post(path, content=json.dumps(known).encode())
        assert answer.status_code < 500, answer.text
        if answer.is_error:
            assert error_in(path, answer)


def _vanish(port: int, path: str, number: int) -> None:
    long = {
        "max_tokens": 400,
        "max_output_tokens": 400,
        "n_predict": 400,
        "options": {"num_predict": 400},
    }
    asked = {**STREAMS[path], "stream": number % 2 == 0, "ignore_eos": True}
    asked.update({name: value for name, value in long.items() if name in asked})
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head + body)
        if number % 4 == 0:
            assert connection.recv(100)


def test_clients_that_vanish_leave_nothing_behind(server: Running) -> None:
    visits = [(path, number) for path in STREAMS for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda visit: _vanish(server.port, *visit), visits))
    until(lambda: is_free(server.service))


def test_lines_that_nobody_reads_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SEND_SECONDS", 0.05)
    monkeypatch.setattr(streaming, "_PING_SECONDS", 0.02)
    closed = []

    async def stuck(*_: Any) -> Any:
        await asyncio.sleep(20)

    async def send(message: Any) -> None:
        if message.get("body"):
            await stuck()

    async def lines() -> AsyncGenerator[bytes, None]:
        try:
            yield b"{}"
        finally:
            closed.append(True)

    for kind in (streaming.EVENTS, "application/x-ndjson"):
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            asyncio.run(streaming.Streamed(lines(), kind)({"type": "http"}, stuck, send))
    assert closed == [True, True]


@pytest.mark.parametrize("kind", [streaming.EVENTS, "application/x-ndjson"])
def test_streams_of_events_show_signs_of_life(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PING_SECONDS", 0.02)
    sent = []

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    async def nothing() -> Any:
        await asyncio.sleep(20)

    async def slow() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.3)
        yield b"{}"

    asyncio.run(streaming.Streamed(slow(), kind)({"type": "http"}, nothing, send))
    assert (b": ping\n\n" in sent) == (kind == streaming.EVENTS)
    assert sent[0] is None
    assert sent[-2:] == [b"{}", b""]


@pytest.mark.parametrize("n_waits", range(6))
def test_nothing_follows_the_end_of_a_stream(n_waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life may be on its way at any moment at which a stream ends."""
    monkeypatch.setattr(streaming, "_PING_SECONDS", 0)
    sent = []

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    async def nothing() -> Any:
        await asyncio.sleep(60)

    async def parts() -> AsyncGenerator[bytes, None]:
        for _ in range(n_waits):
            await asyncio.sleep(0)
        yield b"{}"

    answer = streaming.Streamed(parts(), streaming.EVENTS)({"type": "http"}, nothing, send)
    asyncio.run(asyncio.wait_for(answer, 10))
    assert sent[-1] == b""
    assert sent.count(b"{}") == 1


def test_a_server_that_is_closed_says_so_in_every_dialect(tiny: Tiny) -> None:
    with serving(tiny("llama")) as running, httpx.Client(base_url=running.url) as http:
        running.service.close()
        for path, body in (*STREAMS.items(), ("/tokenize", {"content": "x"})):
            answer = http.post(path, json=body)
            assert answer.status_code == 503
            assert "closing" in json.dumps(answer.json())
        for path in ("/api/tags", "/api/ps", "/props", "/slots"):
            assert http.get(path).status_code == 503


def test_paths_are_counted(http: httpx.Client) -> None:
    ask(http, "/tokenize", {"content": "x"})
    assert 'path="/tokenize",status="200"' in http.get("/metrics").text


def test_the_file_of_a_model_may_be_gone(tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "gone.gguf"
    copy.write_bytes(tiny("llama").read_bytes())
    with serving(copy) as running, ollama.Client(running.url) as llama:
        copy.unlink()
        models = llama.list().models
        assert (models[0].model, models[0].size) == ("gone:latest", 0)


WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
    },
}


@pytest.fixture(scope="module")
def caller(tiny: Tiny) -> Iterator[Running]:
    with serving(tiny("qwen3"), n_ctx=2048) as running:
        yield running


def test_calls_of_functions_in_responses(caller: Running) -> None:
    asked: dict[str, Any] = {
        "model": "llama",
        "input": "How is the weather?",
        "max_output_tokens": 400,
        "tools": [{"type": "function", "strict": True, **WEATHER}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "extra_body": {"seed": 3},
    }
    with openai.OpenAI(base_url=f"{caller.url}/v1", api_key="x") as client:
        item: Any
        (item,) = client.responses.create(**asked).output
        assert item.type == "function_call"
        assert json.loads(item.arguments)["city"] in ("Rome", "Oslo")
        with client.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            final: Any = stream.get_final_response()
        assert final.output[0].arguments == item.arguments
        assert kinds.count("response.function_call_arguments.done") == 1
        given = item.model_dump(exclude_none=True)
        output = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        history: Any = [{"role": "user", "content": "How is the weather?"}, given, output]
        again = client.responses.create(
            model="llama", input=history, tools=asked["tools"], max_output_tokens=9
        )
        assert again.status in ("completed", "incomplete")


def test_calls_of_functions_in_messages(caller: Running) -> None:
    tool = {"name": "get_weather", "input_schema": WEATHER["parameters"]}
    asked: dict[str, Any] = {
        "model": "llama",
        "messages": [{"role": "user", "content": "How is the weather?"}],
        "max_tokens": 400,
        "tools": [tool],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "extra_body": {"seed": 3},
    }
    with anthropic.Anthropic(base_url=caller.url, api_key="x") as client:
        whole: Any = client.messages.create(**asked)
        (block,) = whole.content
        assert block.type == "tool_use"
        assert block.input["city"] in ("Rome", "Oslo")
        assert whole.stop_reason == "tool_use"
        with client.messages.stream(**asked) as stream:
            final: Any = stream.get_final_message()
        assert final.content[0].input == block.input
        assert final.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
        history: Any = [
            *asked["messages"],
            {"role": "assistant", "content": [block.model_dump()]},
            {"role": "user", "content": [result]},
        ]
        tools: Any = [tool]
        again = client.messages.create(model="x", messages=history, tools=tools, max_tokens=9)
        assert again.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_calls_of_functions_for_ollama(llama: ollama.Client) -> None:
    """Its API cannot ask for one; so its form is looked at."""
    parts = [CallPart(0, "get_weather", ""), CallPart(0, None, '{"city": "Rome"}')]
    pieces = [*(Piece("", call=part) for part in parts), Piece("", finish_reason="stop")]
    answer = Answer("", "stop", Usage(1, 0, 1, 9), Timings(0, 0, 0, 0), pieces)
    reply = OllamaReply("llama:latest", is_chat=True)
    (call,) = reply.whole([answer])["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": {"city": "Rome"}}
    messages: Any = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
    ]
    tools: Any = [{"type": "function", "function": WEATHER}]
    again = llama.chat("llama", messages=messages, tools=tools, options={"num_predict": 9})
    assert again.done
