"""The model behind HTTP: what real clients get, what strangers do not, and what is left when they go."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from fixture_types import Load, Tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Running, is_free, serving, until

from amulet_gguf.amulet import Amulet
from amulet_gguf.errors import SettingError
from amulet_gguf.home.config import parse
from amulet_gguf.server import guard, run
from amulet_gguf.server.guard import Access
from amulet_gguf.server.run import listening
from amulet_gguf.settings import Settings

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "How are you?"}]
ASKED: dict[str, Any] = {"messages": HI, "max_tokens": 12, "seed": 3, "temperature": 0.8}
PROFILES = '[profiles.work]\nprefer = ["formal"]\nstrength = 2.0\nmax_tokens = 5\n'


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Running]:
    config = parse(PROFILES, Path("config.toml"))
    with serving(tiny("llama"), config=config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> Iterator[Amulet]:
    with Amulet.load(tiny("llama"), n_ctx=512, n_threads=1) as amulet:
        yield amulet


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
    until(lambda: is_free(server.service))


def test_the_python_client_gets_the_answer_of_the_model(client: openai.OpenAI, alone: Amulet) -> None:
    options = {"max_tokens": 12, "seed": 3, "temperature": 0.8}
    expected = alone.generate("How are you?", prefer="concise", strength=3, **options)  # type: ignore[arg-type]
    asked = {"model": "amulet", "messages": HI, "extra_body": {"prefer": "concise", "strength": 3}}
    whole = client.chat.completions.create(**asked, **options)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.prompt_tokens == expected.usage.prompt_tokens
    assert whole.usage.completion_tokens == expected.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            **asked, **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected.text
    assert len([text for text in texts if text]) > 3
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].usage == whole.usage


def test_the_async_client_shares_steps(server: Running) -> None:
    import asyncio

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.chat.completions.create(
            model="amulet",
            messages=[{"role": "user", "content": f"Say {i}"}],
            max_tokens=30,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(*(ask(client, i) for i in range(12)))

    assert all(asyncio.run(ask_all()))
    until(lambda: is_free(server.service))


def test_the_npm_client_gets_the_same(server: Running, client: openai.OpenAI) -> None:
    folder = Path(__file__).parent / "npm"
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    done = subprocess.run(
        ["node", "client.js", f"{server.url}/v1"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    expected = client.chat.completions.create(
        model="amulet", **ASKED, extra_body={"prefer": "concise", "strength": 3}
    )
    assert got["whole"] == got["text"] == expected.choices[0].message.content
    counted = expected.usage.model_dump(exclude_none=True)
    assert counted.pop("prompt_tokens_details")["cached_tokens"] > 0  # asked before, by the other one
    for usage in (got["usage"], got["wholeUsage"]):
        assert {name: usage[name] for name in counted} == counted
    assert got["reason"] == expected.choices[0].finish_reason
    assert got["legacy"]
    assert got["names"][0] == "llama"
    assert got["failure"]["status"] == 400
    assert "strength" in got["failure"]["message"]
    until(lambda: is_free(server.service))


def test_a_prediction_changes_no_answer(client: openai.OpenAI, http: httpx.Client) -> None:
    asked: dict[str, Any] = {"model": "amulet", "messages": HI, "max_tokens": 24, "seed": 3}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    assert plain
    for predicted in (
        plain,
        plain[: len(plain) // 2] + " and more",
        "",
        [{"type": "text", "text": plain}],
    ):
        prediction: Any = {"type": "content", "content": predicted}
        again = client.chat.completions.create(**asked, prediction=prediction)
        assert again.choices[0].message.content == plain
    wrong = http.post(CHAT, json={**ASKED, "prediction": {"type": "text", "content": "x"}})
    assert wrong.status_code == 400


def test_several_answers_have_their_own_seeds(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> list[str]:
        found = client.chat.completions.create(model="amulet", **{**ASKED, **more})
        return [choice.message.content for choice in found.choices]

    several = ask(n=3)
    assert several == ask(n=3) == [ask(seed=3 + i)[0] for i in range(3)]
    assert len(set(several)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model="amulet", **ASKED, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == several


def test_probabilities_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**ASKED, "logprobs": True, "top_logprobs": 4, "temperature": 0}
    whole = client.chat.completions.create(model="amulet", **asked, extra_body={"repeat_penalty": 1})
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode("utf-8", "replace") == whole.choices[0].message.content
    for entry in entries:
        best = [each.logprob for each in entry.top_logprobs]
        assert len(best) == 4
        assert best == sorted(best, reverse=True)
        assert entry.logprob == best[0]  # greedy
    chunks = client.chat.completions.create(
        model="amulet", **asked, extra_body={"repeat_penalty": 1}, stream=True
    )
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == entries


def test_texts_are_gone_on_with(client: openai.OpenAI, alone: Amulet) -> None:
    request = alone.planner.request(None, None, Settings(max_tokens=9), text="Once upon")
    expected = "".join(p.text for p in alone.engine.stream(alone.engine.submit(request)))
    got = client.completions.create(
        model="amulet", prompt=["Once upon", "<|im_end|>"], max_tokens=9, logprobs=2
    )
    assert got.choices[0].text == expected
    n_read = 0
    for prompt in ("Once upon", "<|im_end|>"):
        one = client.completions.create(model="amulet", prompt=prompt, max_tokens=9, n=2)
        assert one.usage is not None
        n_read += one.usage.prompt_tokens
    assert got.usage is not None
    assert got.usage.prompt_tokens == n_read
    found = got.choices[0].logprobs
    assert found is not None
    assert found.text_offset is not None
    assert found.tokens is not None
    assert found.text_offset[0] == 0
    assert "".join(found.tokens) == expected
    parts = client.completions.create(model="amulet", prompt="Once upon", max_tokens=9, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected


def test_models_and_what_may_follow_their_name(client: openai.OpenAI, http: httpx.Client) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:3] == ["llama", "llama:work", "llama:complex"]
    assert client.models.retrieve("llama:work").id == "llama:work"

    def ask(**fields: Any) -> str:
        answer = http.post(CHAT, json={**ASKED, **fields})
        return str(answer.json()["choices"][0]["message"]["content"])

    assert ask(model="llama:concise") == ask(prefer="concise")
    work = ask(prefer="formal", strength=2, max_tokens=5)
    del ASKED["max_tokens"]
    try:
        assert ask(model="amulet:work") == ask(profile="work") == ask(model="lla:WORK".lower()) == work
    finally:
        ASKED["max_tokens"] = 12
    for model in ("gpt-4o-mini", "openai/amulet", "llama.gguf", "default", "llama:latest", None):
        whole = http.post(CHAT, json={**ASKED, "model": model}).json()
        assert whole["model"] == "llama"
        assert whole["choices"][0]["message"]["content"] == ask()
    assert http.post(CHAT, json={**ASKED, "model": "gpt:concise"}).json()["model"] == "llama:concise"
    for model in ("gpt-4:none", "llama:none", "llama:", ":concise"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=model, messages=HI)  # type: ignore[arg-type]
        assert caught.value.code == "model_not_found"


def test_other_programs_names_for_avoid_and_strength(http: httpx.Client) -> None:
    def ask(**more: Any) -> str:
        answer = http.post(CHAT, json={**ASKED, "prefer": "concise", **more}).json()
        return str(answer["choices"][0]["message"]["content"])

    mine = ask(avoid="verbose", strength=4)
    assert ask(negative_prompt="verbose", guidance_scale=4) == mine
    assert ask(strength=4) != mine
    assert ask(negative_prompt="", guidance_scale=4, strength=None) == ask(strength=4)
    for both in (
        {"strength": 4, "guidance_scale": 4},
        {"avoid": "verbose", "negative_prompt": "verbose"},
    ):
        answer = http.post(CHAT, json={**ASKED, "prefer": "concise", **both})
        assert answer.status_code == 400
        assert "are the same: send one" in answer.json()["error"]["message"]
    answer = http.post(CHAT, json={**ASKED, "negative_prompt": "verbos"})
    assert answer.status_code == 400
    assert "did you mean 'verbose'" in answer.json()["error"]["message"]


def test_biases_and_penalties_of_the_python_client(client: openai.OpenAI, load: Load) -> None:
    def ask(**more: Any) -> list[int]:
        messages: Any = HI
        asked = client.chat.completions.create(
            model="amulet", messages=messages, max_tokens=12, logprobs=True, **more
        )
        logprobs = asked.choices[0].logprobs
        assert logprobs is not None
        return [token for each in logprobs.content or [] for token in load("llama").tokenize(each.token)]

    plain = ask()
    first = plain[0]
    assert first not in ask(logit_bias={str(first): -100})
    only = next(token for token in range(20, 400) if token not in plain)
    assert set(ask(logit_bias={str(only): 100})) == {only}
    often = max(map(plain.count, plain))
    assert max(map((varied := ask(frequency_penalty=2)).count, varied)) <= often
    with pytest.raises(openai.BadRequestError) as caught:
        ask(logit_bias={"999999": 1})
    assert caught.value.param == "logit_bias"


BAD: list[tuple[Any, int]] = [
    (b"{bad", 400),
    (b"", 400),
    (b"\xff\xfe", 400),
    (b"[" * 100_000, 400),
    (b'{"messages": ' + b"9" * 10_000 + b"}", 400),
    ([], 400),
    ({}, 400),
    ({"messages": []}, 400),
    ({"messages": "hi"}, 400),
    ({"messages": [{"role": "user"}]}, 400),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400),
    ({"messages": [{"role": "user", "content": 5}]}, 400),
    ({"messages": [{"role": "user", "content": ""}]}, 400),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///x"}]}]},
        400,
    ),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400),
    ({**ASKED, "strenght": 3}, 400),
    ({**ASKED, "strength": "3"}, 400),
    ({**ASKED, "strength": 1e9}, 400),
    ({**ASKED, "strength": -1e308}, 400),
    ({**ASKED, "plausibility": 2}, 400),
    ({**ASKED, "prefer": 5}, 400),
    ({**ASKED, "prefer": ["x y"] * 9}, 400),
    ({**ASKED, "prefer": "concice"}, 400),
    ({**ASKED, "prefer": "\ud800 \udfff!"}, 200),
    ({**ASKED, "profile": "../../etc/passwd"}, 400),
    ({**ASKED, "max_tokens": 0}, 400),
    ({**ASKED, "max_tokens": -3}, 400),
    ({**ASKED, "max_tokens": 1.5}, 400),
    ({**ASKED, "n": 0}, 400),
    ({**ASKED, "n": 17}, 400),
    ({**ASKED, "n": True}, 400),
    ({**ASKED, "seed": "x"}, 400),
    ({**ASKED, "temperature": -1}, 400),
    ({**ASKED, "top_logprobs": 21}, 400),
    ({**ASKED, "stop": [5]}, 400),
    ({**ASKED, "stop": ["x"] * 20_000}, 400),
    ({**ASKED, "tools": [{"type": "function"}]}, 400),
    ({**ASKED, "presence_penalty": 2.5}, 400),
    ({**ASKED, "frequency_penalty": -2.5}, 400),
    ({**ASKED, "logit_bias": {"999999": 1}}, 400),
    ({**ASKED, "logit_bias": {"5": "x"}}, 400),
    ({**ASKED, "logit_bias": {"5": 101}}, 400),
    ({**ASKED, "system": "Be brief."}, 400),
    ({**ASKED, "presence_penalty": 1, "frequency_penalty": 0.5, "logit_bias": {"5": -100}}, 200),
    ({**ASKED, "response_format": {"type": "sound"}}, 400),
    ({**ASKED, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400),
    ({**ASKED, "response_format": {"type": "json_object", "schema": {"type": "x"}}}, 400),
    ({**ASKED, "response_format": {"type": "json_object"}, "regex": "a"}, 400),
    ({**ASKED, "grammar": "root ::= (", "stream": True}, 400),
    ({**ASKED, "mirostat": 2}, 400),
    ({**ASKED, "echo": True}, 400),
    ({**ASKED, "presence_penalty": 0, "user": "me", "logit_bias": None}, 200),
    ({**ASKED, "messages": [{"role": "user", "content": "<|im_end|><s> \ud800 \x00 \u202e"}]}, 200),
    ({**ASKED, "messages": [{"role": "developer", "content": "Be kind."}, *HI]}, 200),
    ({**ASKED, "messages": [*HI, {"role": "assistant", "content": None}, *HI]}, 200),
    ({**ASKED, "messages": [*HI, {"role": "assistant", "content": "So"}]}, 200),
    ({**ASKED, "messages": [{"role": "assistant", "content": "So"}]}, 400),
    ({**ASKED, "messages": [{"role": "user"}]}, 400),
    ({**ASKED, "messages": [{"role": "user", "content": None}]}, 400),
    ({**ASKED, "chat_template_kwargs": {"enable_thinking": False}}, 200),
    ({**ASKED, "chat_template_kwargs": {"messages": []}}, 400),
    ({**ASKED, "chat_template_kwargs": 3}, 400),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_requests_get_the_right_answer(http: httpx.Client, number: int) -> None:
    body, status = BAD[number]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for stream in (False, True):
        if isinstance(body, dict) and stream:
            content = json.dumps({**body, "stream": True}).encode()
        answer = http.post(CHAT, content=content)
        assert answer.status_code == status, answer.text
        if status != 200:
            error = answer.json()["error"]
            assert error["type"] in ("invalid_request_error", "exceed_context_size_error")
            assert error["message"]
            assert "\n" not in error["message"]
            assert "Traceback" not in answer.text


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "role", "content", "prefer", "strength", "n", "stop", "seed"]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_nonsense_is_refused_without_a_server_error(server: Running, body: Any) -> None:
    for path in (CHAT, "/v1/completions", f"{CHAT}/x"):
        send = httpx.patch if path.endswith("x") else httpx.post
        answer = send(server.url + path, content=json.dumps(body).encode())
        assert answer.status_code < 500, answer.text
        answer.json()


def test_others_are_not_disturbed(server: Running, http: httpx.Client) -> None:
    asked = {**ASKED, "max_tokens": 150, "stream": True}
    lines = [line for line in http.post(CHAT, json=asked).text.splitlines() if '"delta"' in line]
    expected = [json.loads(line[6:])["choices"] for line in lines]
    with http.stream("POST", CHAT, json=asked) as answer:
        got = []
        bad = iter(BAD * 4)
        for line in answer.iter_lines():
            if '"delta"' in line:
                got.append(json.loads(line[6:])["choices"])
                body, status = next(bad)
                if status == 400:
                    content = body if isinstance(body, bytes) else json.dumps(body).encode()
                    assert httpx.post(server.url + CHAT, content=content).status_code == 400
    assert got == expected


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(http: httpx.Client, chunked: bool) -> None:
    data = b" " * 10_000_000
    content = (data[i : i + 65536] for i in range(0, len(data), 65536)) if chunked else data
    answer = http.post(CHAT, content=content)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/health").status_code == 200


def test_long_headers_are_refused(http: httpx.Client) -> None:
    answer = http.get("/health", headers={"x-long": "x" * 40_000})
    assert answer.status_code == 431
    assert answer.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8080"}, 403),
        ({"host": "192.168.1.7"}, 403),
        ({"host": "[bad"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "LOCALHOST:1"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[bad"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_foreign_hosts_and_origins_are_refused(
    http: httpx.Client, headers: dict[str, str], status: int
) -> None:
    answer = http.get("/v1/models", headers=headers)
    assert answer.status_code == status
    # A page may read why it was refused, and nothing else.
    assert ("access-control-allow-origin" in answer.headers) <= ("error" in answer.json())
    if status == 403:
        assert answer.json()["error"]["message"]


def test_the_own_origin_may_ask(http: httpx.Client, server: Running) -> None:
    assert http.get("/v1/models", headers={"origin": server.url}).status_code == 200
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert http.options(CHAT, headers=preflight).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", CHAT, 405), ("GET", "/v1/models/../../etc/passwd", 404)],
)
def test_unknown_places_answer_in_the_same_form(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for(tiny: Tiny) -> None:
    access = Access(api_key="sécret", allow_origins=("http://app.example",))
    with serving(tiny("llama"), access) as running:

        def status(authorization: bytes | None, path: str = "/v1/models") -> int:
            headers = {} if authorization is None else {b"authorization": authorization}
            return httpx.get(running.url + path, headers=headers).status_code

        assert status("Bearer sécret".encode()) == 200
        for bad in (
            None,
            b"",
            b"Bearer",
            b"Bearer s",
            b"Basic s\xc3\xa9cret",
            b"Bearer \xff\xfe",
            b"\xe9",
        ):
            assert status(bad) == 401
            assert status(bad, "/metrics") == 401
            assert status(bad, "/nothing") == 401
        assert status(None, "/health") == status(None, "/") == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong").models.list()
        allowed = {"origin": "http://app.example", "access-control-request-method": "POST"}
        answer = httpx.options(running.url + CHAT, headers=allowed)
        assert answer.headers["access-control-allow-origin"] == "http://app.example"
        assert answer.status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com", ""])
def test_others_are_not_let_in_without_a_key(host: str) -> None:
    for hosts in ((host,), ("127.0.0.1", host)):
        with pytest.raises(SettingError, match="AMULET_API_KEY"), listening(Access(hosts), 0):
            pass
    with pytest.raises(SettingError, match="allow-origin"), listening(Access(allow_origins=("*",)), 0):
        pass


def test_what_is_sent_is_not_held_back() -> None:
    with listening(Access(), 0) as listeners:
        assert listeners[0].proto == socket.IPPROTO_TCP  # without, asyncio does not set TCP_NODELAY


def test_an_address_in_use_is_told(server: Running) -> None:
    with pytest.raises(SettingError, match="in use"), listening(Access(), server.port):
        pass


def test_several_addresses_have_one_port(tiny: Tiny) -> None:
    hosts = ("127.0.0.1", "::1" if socket.has_dualstack_ipv6() else "127.0.0.2")
    with serving(tiny("llama"), Access(hosts)) as running:
        for host in hosts:
            shown = f"[{host}]" if ":" in host else host
            assert httpx.get(f"http://{shown}:{running.port}/v1/models").status_code == 200


def test_parts_may_be_left_out(tiny: Tiny) -> None:
    with serving(tiny("llama"), without=("page", "slots")) as running:
        got = {path: httpx.get(running.url + path) for path in ("/", "/slots", "/metrics", "/health")}
        assert [answer.status_code for answer in got.values()] == [404, 501, 200, 200]
        assert "without" in got["/"].json()["error"]["message"]
        assert "without" in got["/slots"].json()["error"]["message"]


def test_a_strength_changes_while_text_streams(server: Running, http: httpx.Client) -> None:
    asked = {**ASKED, "prefer": ["concise", "formal:0.5"], "max_tokens": 400, "stream": True}
    asked |= {"adjustable": True, "explain": True}
    with http.stream("POST", CHAT, json=asked) as answer:
        lines = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
        for chunk in lines:
            if "amulet" in chunk["choices"][0]:
                break
        assert chunk["choices"][0]["amulet"]["alternatives"]
        path = f"{CHAT}/{chunk['id']}"
        changed = httpx.patch(server.url + path, json={"strength": 0.5})
        assert changed.json() == {"id": chunk["id"], "strength": 0.5, "weights": [1.0, 0.5]}
        later = [each["choices"][0]["amulet"] for each in lines if "amulet" in each["choices"][0]]
    # Half way to the base: what follows is away from prompting.
    assert later[-1]["strength"] == 0.5
    assert later[-1]["divergence"] > 0
    assert http.patch(path, json={"strength": 2}).status_code == 404
    assert http.patch(f"{CHAT}/none", json={}).status_code == 404


def test_a_full_queue_says_when_to_come_back(tiny: Tiny) -> None:
    with serving(tiny("llama"), n_ctx=16384, n_sequences=2, max_waiting=1) as running:
        asked = {**ASKED, "max_tokens": 16000, "prefer": "concise", "strength": 6, "stream": True}
        asked["min_tokens"] = 16000
        with httpx.stream("POST", running.url + CHAT, json=asked, timeout=30) as first:
            lines = first.iter_lines()
            next(lines)
            with httpx.stream("POST", running.url + CHAT, json=asked, timeout=30):
                third = httpx.post(running.url + CHAT, json=asked)
                assert third.status_code == 503
                assert int(third.headers["retry-after"]) > 0
                assert third.json()["error"]["code"] == "queue_full"
            assert next(lines) is not None
        until(lambda: is_free(running.service))


def _vanish(port: int, number: int) -> None:
    """Connect, ask, and go away at one point or another."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        if number % 8 == 0:
            return
        asked = {
            **ASKED,
            "max_tokens": 450,
            "prefer": "concise",
            "strength": 3,
            "stream": number % 2 == 0,
        }
        asked["n"] = 2
        body = json.dumps(asked).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        message = head + body
        connection.sendall(message[: len(message) // 2] if number % 8 == 1 else message)
        if number % 8 > 3:
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                connection.recv(100)


def _open_files() -> int:
    return psutil.Process().num_fds()


@pytest.mark.skipif(sys.platform == "win32", reason="counts file descriptors")
def test_clients_that_vanish_leave_nothing_behind(tiny: Tiny) -> None:
    with serving(tiny("llama"), max_waiting=1000) as running:
        httpx.post(running.url + CHAT, json=ASKED)
        until(lambda: is_free(running.service))
        threads = threading.active_count()
        files = _open_files()
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda number: _vanish(running.port, number), range(200)))
        until(lambda: is_free(running.service))
        until(lambda: threading.active_count() <= threads and _open_files() <= files)
        assert running.service.wait_ready().engine.n_live == 0
        assert httpx.post(running.url + CHAT, json=ASKED).status_code == 200


def test_idle_connections_do_not_keep_others_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAD_SECONDS", 1.0)
    with serving(tiny("llama")) as running:
        idle = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(300)]
        try:
            for connection in idle[::2]:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            assert httpx.post(running.url + CHAT, json=ASKED, timeout=30).status_code == 200
            for connection in idle:  # both kinds are closed by the server in the end
                connection.settimeout(20)
                assert connection.recv(100) == b""
        finally:
            for connection in idle:
                connection.close()


def test_a_body_that_does_not_come_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{".encode()
        )
        assert b" 408 " in connection.recv(4096).splitlines()[0]


def test_no_prompt_gets_into_logs(
    server: Running,
    http: httpx.Client,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    secret = [{"role": "user", "content": "xyzzy-secret"}]
    assert http.post(CHAT, json={**ASKED, "messages": secret}).status_code == 200
    assert http.post(CHAT, json={**ASKED, "messages": secret, "strength": "xyzzy-secret"}).is_error
    assert http.post(CHAT, content=b'"xyzzy-secret').is_error

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("xyzzy-secret")

    monkeypatch.setattr(server.service.wait_ready().planner, "request", crash)
    answer = http.post(CHAT, json={**ASKED, "messages": secret})
    assert answer.status_code == 500
    assert "xyzzy" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    until(lambda: "RuntimeError" in caplog.text)  # it is answered before it is logged
    assert "xyzzy" not in caplog.text


def test_the_counters_count(server: Running, http: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = value("amulet_completion_tokens_total")
    answer = http.post(CHAT, json=ASKED).json()
    until(lambda: is_free(server.service))
    assert value("amulet_completion_tokens_total") - before == answer["usage"]["completion_tokens"]
    assert value("amulet_live") == 0
    http.get("/made-up-by-a-stranger")
    assert "made-up" not in http.get("/metrics").text


def test_a_service_that_is_closed_says_so(tiny: Tiny) -> None:
    with serving(tiny("llama")) as running:
        running.service.close()
        assert httpx.get(f"{running.url}/health").status_code == 503
        answer = httpx.post(running.url + CHAT, json=ASKED)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "closed"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_the_command_serves_until_it_is_interrupted(tiny: Tiny, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "amulet_gguf",
            "serve",
            "-m",
            str(tiny("llama")),
            "-c",
            "512",
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "AMULET_HOME": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    try:
        url = process.stderr.readline().split(" at ")[1].split()[0]
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        asked = {**ASKED, "max_tokens": 450, "stream": True, "stop": ["\0"]}
        with httpx.stream("POST", url + CHAT, json=asked, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.RemoteProtocolError):
                list(lines)
            process.wait(20)
        output, errors = process.communicate()
        assert "Traceback" not in errors
        assert output == ""
    finally:
        process.kill()
        process.wait()


def test_the_command_refuses_to_be_open_to_all(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "amulet_gguf", "serve", "--host", "0.0.0.0"]
    environment = {**os.environ, "AMULET_HOME": str(tmp_path)}
    environment.pop("AMULET_API_KEY", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert "--api-key" in done.stderr
    assert done.stdout == ""
