"""Thoughts over HTTP: apart from the answer, streamed and whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fixture_types import Tiny
from serving import Running, serving

from amulet_gguf.prompts.sandbox import CHATML

HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(CHATML.replace("assistant\n", "assistant\n<think>\n"), "utf-8")
    running: Running
    with serving(tiny("llama"), chat_template=template) as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="x")


def ask(client: openai.OpenAI, **options: Any) -> Any:
    more = {"think_tokens": 8, "prefer": "concise", "strength": 3, **options.pop("extra_body", {})}
    return client.chat.completions.create(
        model="amulet", messages=HI, max_tokens=6, extra_body=more, **options
    )


@pytest.mark.parametrize("logprobs", [None, True])
def test_a_thought_has_a_field_of_its_own(client: openai.OpenAI, logprobs: bool | None) -> None:
    whole = ask(client, logprobs=logprobs)
    message = whole.choices[0].message
    assert message.reasoning_content
    assert message.content
    assert whole.choices[0].finish_reason == "length"
    usage = whole.usage
    n_thought = usage.completion_tokens_details.reasoning_tokens
    assert usage.completion_tokens - n_thought == 6
    if logprobs:
        assert len(whole.choices[0].logprobs.content) == 6

    thought = content = ""
    reasons = []
    for chunk in ask(client, stream=True, logprobs=logprobs):
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        assert not (content and getattr(delta, "reasoning_content", None))  # the thought comes first
        content += delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (thought.strip(), content) == (message.reasoning_content, message.content)
    assert reasons[-1] == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"think": False}},
        {"reasoning_effort": "minimal"},
    ],
)
def test_who_asks_for_no_thought_gets_none(client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = ask(client, **options)
    assert not hasattr(whole.choices[0].message, "reasoning_content")
    assert whole.choices[0].message.content
    assert ask(client, reasoning_effort="low").choices[0].message.reasoning_content


def test_what_was_thought_before_is_not_asked_for_again(client: openai.OpenAI, tmp_path: Path) -> None:
    """A message that a client sends back with its thought is understood."""
    first = ask(client).choices[0].message
    messages: Any = [*HI, first.model_dump(exclude_none=True), *HI]
    again = client.chat.completions.create(
        model="amulet", messages=messages, max_tokens=3, extra_body={"think_tokens": 3}
    )
    assert again.choices[0].message.content
