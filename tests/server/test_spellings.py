"""Requests as clients spell them: accepted with their usual meaning, or refused by name."""

from __future__ import annotations

import gzip
import ipaddress
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from fixture_types import Tiny
from serving import Running, is_free, serving, until

from amulet_gguf.server.asked import _IGNORED, _NEUTRAL
from amulet_gguf.server.guard import MAX_BODY, Access
from amulet_gguf.server.schemas import FORMATS

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "How are you?"}]
ASKED: dict[str, Any] = {"messages": HI, "max_tokens": 8, "seed": 3, "temperature": 0.8}


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Running]:
    access = Access(allow_hosts=("*.localhost",), allow_origins=("http://app.example",))
    with serving(tiny("llama"), access, max_tokens=40) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
    until(lambda: is_free(server.service))


def ask(http: httpx.Client, **more: Any) -> dict[str, Any]:
    answer = http.post(CHAT, json={**ASKED, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text(http: httpx.Client, **more: Any) -> str:
    return str(ask(http, **more)["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("spelt", "meant"),
    [
        ({"max_tokens": 8.0, "seed": 3.0, "top_k": 4.0}, {"top_k": 4}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"temperature": 0}),
        ({"stop": ""}, {}),
        ({"stop": [""]}, {}),
        ({"stop": None, "n": None, "logprobs": None, "tools": None, "response_format": None}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"repetition_penalty": 1.4}, {"repeat_penalty": 1.4}),
        ({"n_predict": 3, "max_tokens": None}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3, "max_tokens": None}, {"max_tokens": 3}),
        ({"seed": -5}, {"seed": 2**64 - 5}),
        ({"logit_bias": [[40, False], [41, -3]]}, {"logit_bias": {"40": -100, "41": -3}}),
        ({"guided_regex": "[a-c]{3}"}, {"regex": "[a-c]{3}"}),
        ({"json_schema": {"const": "42"}}, {"schema": {"const": "42"}}),
        ({"schema": {"enum": ["42"], "format": "nanoid"}}, {"schema": {"enum": ["42"]}}),
        ({"reasoning_effort": "max"}, {"reasoning_effort": "high"}),
    ],
)
def test_a_spelling_means_what_it_means_elsewhere(
    http: httpx.Client, spelt: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert text(http, **spelt) == text(http, **meant)


@pytest.mark.parametrize("most", [-1, 41, 10**30, 4000.0])
def test_too_long_an_answer_is_cut_where_the_limit_is(http: httpx.Client, most: float) -> None:
    whole = ask(http, max_tokens=most, ignore_eos=True)
    assert whole["usage"]["completion_tokens"] == 40
    assert whole["choices"][0]["finish_reason"] == "length"
    models = http.get("/v1/models").json()
    assert models["data"][0]["amulet"]["max_tokens"] == 40
    assert models["data"][0]["max_model_len"] == 512


def test_ends_that_are_too_early_are_not_chosen(http: httpx.Client) -> None:
    lengths = [ask(http, seed=i, max_tokens=30, temperature=1.5)["usage"] for i in range(12)]
    assert any(usage["completion_tokens"] < 20 for usage in lengths)
    for i in range(12):
        whole = ask(http, seed=i, max_tokens=30, temperature=1.5, min_tokens=20)
        assert whole["usage"]["completion_tokens"] >= 20
    assert ask(http, seed=1, temperature=1.5, min_tokens=500)["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("name", sorted(_NEUTRAL))
def test_values_that_change_nothing_pass_and_others_are_refused_by_name(
    http: httpx.Client, name: str
) -> None:
    for value in _NEUTRAL[name]:
        assert text(http, **{name: value}) == text(http)
    answer = http.post(CHAT, json={**ASKED, name: "something"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_what_means_nothing_here_is_passed_over(http: httpx.Client) -> None:
    assert text(http, **dict.fromkeys(_IGNORED, "whatever")) == text(http)


@pytest.mark.parametrize(
    "path",
    [
        "/chat/completions",
        "/v1/chat/completions/",
        "/chat/completions/",
        "/completions",
        "/v1/completions/",
    ],
)
def test_paths_with_and_without_what_clients_add(http: httpx.Client, path: str) -> None:
    body = ASKED if "chat" in path else {"prompt": "Once", "max_tokens": 3}
    answer = http.post(path, json=body)
    assert answer.status_code == 200
    assert answer.json()["choices"]


def test_heads_and_options(http: httpx.Client) -> None:
    for path in ("/", "/health", "/v1/models", "/models/", "/v1/models/llama"):
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == http.get(path).headers["content-type"]
    assert http.head("/nothing").status_code == 404
    options = http.options(CHAT)
    assert options.status_code == 204
    assert "POST" in options.headers["allow"]


def test_bodies_in_gzip(http: httpx.Client) -> None:
    packed = gzip.compress(json.dumps(ASKED).encode())

    def status(content: bytes, encoding: str = "gzip") -> int:
        return http.post(CHAT, content=content, headers={"content-encoding": encoding}).status_code

    answer = http.post(CHAT, content=packed, headers={"content-encoding": "gzip"})
    assert answer.json()["choices"][0]["message"]["content"] == text(http)
    assert status(packed, "br") == 415
    assert status(packed[:-9]) == 400
    assert status(b"no gzip") == 400
    assert status(json.dumps(ASKED).encode(), "identity") == 200
    assert status(gzip.compress(b" " * (MAX_BODY + 1))) == 413
    assert status(gzip.compress(b" " * 500_000_000, 1)) == 413


def test_browsers_of_allowed_pages_get_what_they_ask_for(http: httpx.Client) -> None:
    preflight = {
        "origin": "http://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os,x-stainless-lang",
        "access-control-request-private-network": "true",
    }
    answer = http.options(CHAT, headers=preflight)
    assert answer.status_code == 200
    allowed = answer.headers["access-control-allow-headers"]
    assert "x-stainless-os" in allowed
    assert answer.headers["access-control-allow-private-network"] == "true"
    refused = http.post(CHAT, json=ASKED, headers={"origin": "http://evil.example"})
    assert refused.status_code == 403
    assert "--allow-origin" in refused.json()["error"]["message"]


def test_names_that_stars_stand_for(http: httpx.Client) -> None:
    def status(host: str) -> int:
        return http.get("/v1/models", headers={"host": host}).status_code

    assert status("app.localhost") == status("a.b.localhost:8080") == 200
    assert status("localhost.evil") == status("evillocalhost") == 403


def test_keys_in_either_head(tiny: Tiny) -> None:
    with serving(tiny("llama"), Access(api_key="sesame")) as running:

        def status(**headers: str) -> int:
            return httpx.get(
                f"{running.url}/v1/models", headers={k.replace("_", "-"): v for k, v in headers.items()}
            ).status_code

        assert status(x_api_key="sesame") == status(authorization="Bearer sesame") == 200
        assert status(x_api_key="wrong") == status() == status(authorization="Basic sesame") == 401
        assert status(x_api_key="sesame", authorization="Bearer wrong") == 401


def test_a_context_that_is_too_small_is_told_in_words_that_libraries_know(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "word " * 2000}]})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens" in error["message"]
    assert error["n_ctx"] == 512
    assert error["n_prompt_tokens"] > 512


class Pet(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    legs: int = pydantic.Field(ge=0, le=8)


def test_structured_output_of_the_python_client(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        messages: Any = HI
        parsed = client.chat.completions.parse(
            model="amulet",
            messages=messages,
            response_format=Pet,
            max_tokens=40,
            temperature=0.7,
            seed=1,
        )
        assert isinstance(parsed.choices[0].message.parsed, Pet)
        with client.chat.completions.stream(
            model="amulet",
            messages=messages,
            response_format=Pet,
            max_tokens=40,
            temperature=0.7,
            seed=1,
        ) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.parsed == parsed.choices[0].message.parsed
        free = client.chat.completions.create(
            model="amulet", messages=messages, response_format={"type": "json_object"}, max_tokens=6
        )
        assert (free.choices[0].message.content or "").startswith("{")
        assert free.choices[0].finish_reason in ("length", "stop")
        cut = client.chat.completions.create(
            model="amulet",
            messages=messages,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"pattern": "a{99}", "type": "string"}},
            },
            max_tokens=4,
        )
        assert cut.choices[0].finish_reason == "length"


def formed(http: httpx.Client, schema: Any, *, strict: bool | None = None) -> Any:
    """Return what comes of a schema: the JSON value, or the status of an error."""
    described = {"name": "x", "schema": schema, "strict": strict}
    form = {"type": "json_schema", "json_schema": described}
    answer = http.post(CHAT, json={**ASKED, "max_tokens": 40, "response_format": form})
    if answer.status_code != 200:
        return answer.status_code
    return json.loads(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("strict", [True, None])
@pytest.mark.parametrize("form", [*sorted(FORMATS), "nanoid", "ipvanyaddress", "format"])
def test_formats_of_any_name(http: httpx.Client, form: str, strict: bool | None) -> None:
    value = {"enum": ["a"]} if form not in FORMATS else {"const": 1}
    schema = {"properties": {"format": {**value, "format": form}}, "required": ["format"]}
    found = formed(http, {"type": "object", **schema}, strict=strict)
    assert found == {"format": value.get("const", "a")}
    assert formed(http, {"type": "integer", "format": form, "maximum": 3, "minimum": 3}) == 3


def test_a_known_format_is_held_to(http: httpx.Client) -> None:
    # The pattern looks around, which a grammar cannot; the format beside it says the same.
    asked = {"type": "string", "format": "ipv4", "pattern": r"^(?=\d)[\d.]+$"}
    for strict in (True, False):
        assert ipaddress.IPv4Address(formed(http, asked, strict=strict))


@pytest.mark.parametrize(
    ("names", "allowed"),
    [({"type": "string"}, r""), ({"enum": ["a", "b"]}, "[ab]"), ({"pattern": "^[cd]$"}, "[cd]")],
)
def test_names_of_properties(http: httpx.Client, names: Any, allowed: str) -> None:
    for strict in (True, False):
        schema = {"type": "object", "propertyNames": names, "additionalProperties": {"const": 1}}
        found = formed(http, {**schema, "minProperties": 0, "maxProperties": 1}, strict=strict)
        assert all(re.match(allowed, name) for name in found)
        assert set(found.values()) <= {1}


@pytest.mark.parametrize(
    "beyond",
    [
        {"items": {"const": 1}, "uniqueItems": True, "maxItems": 1},
        {"items": {"const": 1}, "contains": {"const": 1}, "maxItems": 1},
        {"items": {"oneOf": [{"const": 1}, {"enum": [1]}]}, "maxItems": 1},
        {"items": {"not": {"type": "null"}, "const": 1}, "maxItems": 1},
        {"items": {"type": "string", "pattern": "^(?!b)a$", "maxLength": 1}, "maxItems": 1},
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 1}}, "minProperties": 2},
    ],
    ids=["unique", "contains", "one", "not", "look", "least"],
)
def test_what_cannot_be_promised_is_refused_only_where_it_is_strict(
    http: httpx.Client, beyond: dict[str, Any]
) -> None:
    schema = {"type": "array", **beyond}
    assert isinstance(formed(http, schema), (list, dict))
    assert isinstance(formed(http, schema, strict=False), (list, dict))
    assert formed(http, schema, strict=True) == 400
    assert http.post(CHAT, json={**ASKED, "schema": schema}).status_code == 400


@pytest.mark.parametrize(
    "odd",
    [
        {"format": 3}, {"format": None}, {"propertyNames": True}, {"propertyNames": {"enum": 3}},
        {"propertyNames": {"pattern": [3]}}, {"propertyNames": {"const": [3]}}, {"properties": [3]},
        {"required": [{}], "properties": {"a": True}}, {"required": 3, "properties": {"a": True}},
        {"pattern": 3}, {"oneOf": 3}, {"$defs": []}, {"allOf": {"format": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_schemas_end_well(http: httpx.Client, odd: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": odd}}
    bodies: list[dict[str, Any]] = [{"schema": odd}, {"tools": [tool], "tool_choice": "required"}]
    bodies += [{"response_format": {"type": "json_schema", "json_schema": {"schema": odd}}}]
    for body in bodies:
        assert http.post(CHAT, json={**ASKED, **body}).status_code in (200, 400)


def test_schemas_without_an_end(http: httpx.Client) -> None:
    deep: Any = {"type": "object"}
    for _ in range(900):
        deep = {"items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    for body in ({"schema": deep}, {"tools": [tool]}):
        answer = http.post(CHAT, json={**ASKED, **body})
        assert answer.status_code == 400
        assert "deep" in answer.json()["error"]["message"]


def test_parts_of_contents(http: httpx.Client) -> None:
    def status(part: Any) -> tuple[int, str]:
        said = {"role": "assistant", "content": [part]}
        answer = http.post(CHAT, json={**ASKED, "messages": [*HI, said, *HI]})
        return answer.status_code, str(answer.json())

    assert status({"type": "refusal", "refusal": "I cannot."})[0] == 200
    assert status({"type": "text", "text": "Well."})[0] == 200
    code, told = status({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}})
    assert (code, "image_url" in told) == (400, True)
    for odd in ({"type": "refusal"}, {"type": 3}, {"text": "a"}, "a", None):
        assert status(odd)[0] == 400


def test_counts_and_times(http: httpx.Client) -> None:
    first, again = (ask(http, messages=[{"role": "user", "content": "Tell me more."}]) for _ in range(2))
    n_prompt = first["usage"]["prompt_tokens"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < n_prompt == again["usage"]["prompt_tokens"]
    times = again["timings"]
    assert times["cache_n"] + times["prompt_n"] == n_prompt
    assert times["predicted_n"] == again["usage"]["completion_tokens"]
    assert times["prompt_ms"] > 0
    assert first["system_fingerprint"] == again["system_fingerprint"]


def test_a_stream_tells_how_much_of_the_prompt_is_read(tiny: Tiny) -> None:
    with serving(tiny("llama"), n_batch=32) as running, httpx.Client(base_url=running.url) as http:
        asked = {**ASKED, "messages": [{"role": "user", "content": "word " * 90}], "stream": True}
        lines = http.post(CHAT, json={**asked, "return_progress": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert len(told) > 3
        n_read = [each["processed"] for each in told]
        assert n_read == sorted(n_read)
        assert n_read[-1] == told[-1]["total"] > 90
        at = [i for i, event in enumerate(events) if "prompt_progress" in event]
        first = next(i for i, event in enumerate(events) if event["choices"][0]["delta"].get("content"))
        assert max(at) < first
        plain = http.post(CHAT, json=asked).text
        assert "prompt_progress" not in plain


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_each_part_of_a_stream_tells_the_times_to_who_wants_them(http: httpx.Client, path: str) -> None:
    asked: dict[str, Any] = {"temperature": 0.8, "seed": 3, "stream": True}
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    prompt = {CHAT: "messages", "/v1/completions": "prompt", "/v1/responses": "input"}[path]
    asked |= {limit: 6, prompt: ASKED["messages"] if path == CHAT else "Once"}
    lines = http.post(path, json={**asked, "timings_per_token": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "timings" not in events[0] or path == "/v1/completions"  # which begins with a text
    counts = [event["timings"]["predicted_n"] for event in events if "timings" in event]
    assert counts == sorted(counts)
    assert len(counts) > 1
    assert counts[-1] == 6
    plain = http.post(path, json=asked).text
    assert plain.count("timings") == (path == "/v1/responses")  # at its end


def test_tokens_that_were_forced_have_probabilities_too(http: httpx.Client) -> None:
    whole = ask(http, regex="The sea is wide[.!]", logprobs=True, top_logprobs=2, max_tokens=30)
    entries = whole["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in entries).decode() == text(
        http, regex="The sea is wide[.!]", max_tokens=30
    )
    assert entries[1]["logprob"] == 0


def test_a_last_message_of_the_assistants_is_gone_on_with_by_any_name(http: httpx.Client) -> None:
    begun = [*HI, {"role": "assistant", "content": "So"}]
    plain = text(http, messages=begun)
    more = {"continue_final_message": True, "add_generation_prompt": False}
    assert text(http, messages=begun, **more) == plain
    for wrong in (
        {"messages": begun, "continue_final_message": True, "add_generation_prompt": True},
        {"messages": HI, "continue_final_message": True},
    ):
        answer = http.post(CHAT, json={**ASKED, **wrong})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "continue_final_message"


def test_the_prompt_is_told_to_who_wants_to_see_it(http: httpx.Client) -> None:
    prompt = ask(http, verbose=True)["__verbose"]["prompt"]
    assert prompt == http.post("/apply-template", json={"messages": HI}).json()["prompt"]
    assert "How are you?" in prompt
    assert "__verbose" not in ask(http)


def test_several_answers_all_have_the_form(http: httpx.Client) -> None:
    whole = ask(http, n=3, regex="[a-c]{2,5}")
    found = [choice["message"]["content"] for choice in whole["choices"]]
    assert all(re.fullmatch("[a-c]{2,5}", each) for each in found)
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop"] * 3
