"""Nonsense in any argument of the Python API is taken for something or refused, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_types import Tiny

from amulet_gguf import (
    Amulet,
    AmuletError,
    AmuletService,
    Preference,
    Settings,
    Tools,
    combine,
    strength,
)
from amulet_gguf.conversation.turns import Conversation
from amulet_gguf.llama.loading import LOADING
from amulet_gguf.settings import SETTINGS

NONSENSE: list[Any] = [
    None, True, 1.5, -1, 0, 10**30, 10**5000, 1 + 2j, math.nan, math.inf, -math.inf,
    "", "x", "\0", "\ud800", "9" * 30, b"", b"x", [], [None], [1], ["x"], ["\ud800"], [[]], [{}], {},
    {"a": 1}, {1: 2}, (), ("x", 1), (1, 2, 3), range(3), iter([1]), object(), int,
    [("x", math.nan)], [("x", 10**400)], {"role": "user"}, [{"role": "user", "content": 5}],
    [{"role": 5, "content": "x"}], [{"role": "user", "content": "\ud800"}], {"type": "\ud800"},
]  # fmt: skip
FUNCTION = {"type": "function", "function": {"name": "f"}}
SAID = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
ROWS = np.zeros((2, 5), np.float32)
Act = Callable[[Any], object]


@pytest.fixture(scope="module")
def amulet(tiny: Tiny) -> Iterator[Amulet]:
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1) as loaded:
        yield loaded


def refused_or_taken(acts: dict[str, Act]) -> None:
    wrong = []
    for name, act in acts.items():
        for i, value in enumerate(NONSENSE):
            try:
                act(value)
            except AmuletError as error:  # noqa: PERF203
                if not 0 < len(str(error)) <= 500 or not str(error).isprintable():
                    wrong.append((name, i, str(error)))
            except Exception as error:
                wrong.append((name, i, repr(error)))
    assert not wrong


def test_of_generations(amulet: Amulet) -> None:
    def generate(name: str) -> Act:
        base = {} if name in ("prompt", "messages") else {"prompt": "x"}
        return lambda value: amulet.generate(**{**base, "max_tokens": 1, name: value})

    def message(name: str, role: str) -> Act:
        def ask(value: Any) -> object:
            said = [SAID[0], {"role": role, "content": "x", name: value}, SAID[0]]
            return amulet.generate(messages=said, max_tokens=1)

        return ask

    def tool(name: str) -> Act:
        return lambda value: amulet.generate(
            "x", max_tokens=1, tools=Tools([{"function": {"name": "f", name: value}}])
        )

    refused_or_taken(
        {name: generate(name) for name in ("prompt", "messages", "draft", "tools", *SETTINGS)}
        | {
            f"{name} of {role}": message(name, role)
            for name in ("role", "content", "tool_calls", "reasoning_content", "tool_call_id")
            for role in ("user", "assistant", "tool")
        }
        | {f"function.{name}": tool(name) for name in ("name", "description", "parameters")}
        | {
            "settings": lambda value: amulet.generate("x", settings=value).text[:1],
            "on_prefill": lambda value: amulet.stream("x", on_prefill=value, max_tokens=1).answer(),
            "functions": lambda value: Tools(value),
            "choice": lambda value: Tools([FUNCTION], value),
            "prompt of compare": lambda value: amulet.compare(value, {"a": Settings(max_tokens=1)}),
            "settings of compare": lambda value: amulet.compare("x", value),
            "one of compare": lambda value: amulet.compare("x", {"a": value}),
        }
    )


def test_of_what_needs_no_model() -> None:
    refused_or_taken(
        {
            "text": lambda value: Preference(value),
            "weight": lambda value: Preference("concise", value),
            "parse": Preference.parse,
            "paper": Settings.paper,
            "alpha": lambda value: strength(alpha=value),
            "iterations": lambda value: strength(iterations=value),
            "logits": lambda value: combine(value, [0, 1]),
            "coefficients": lambda value: combine(ROWS, value),
            "plausibility": lambda value: combine(ROWS, [0, 1], value),
            "reference": lambda value: combine(ROWS, [0, 1], 0.1, value),
            "out": lambda value: combine(ROWS, [0, 1], 0.1, None, value),
        }
    )


def test_of_conversations(amulet: Amulet) -> None:
    refused_or_taken(
        {
            "messages": lambda value: Conversation(amulet, None, value).ask("x", max_tokens=1).answer(),
            "settings": lambda value: Conversation(amulet, value).settings.replace(),
            "ask": lambda value: Conversation(amulet).ask(value, max_tokens=1).answer(),
            "draft": lambda value: Conversation(amulet).ask("x", draft=value, max_tokens=1).answer(),
            "restyle": lambda value: Conversation(amulet, None, SAID).restyle(prefer=value).close(),
        }
    )


def test_of_services(tiny: Tiny) -> None:
    with AmuletService(tiny("llama"), n_ctx=256, n_threads=1) as service:

        def ask(name: str) -> Act:
            base = {} if name in ("prompt", "messages", "text") else {"prompt": "x"}
            return lambda value: service.stream(**{**base, "max_tokens": 1, name: value}).answer()

        stream = service.stream("x", prefer="concise", max_tokens=1)
        names = ("prompt", "messages", "text", "draft", "tools", "n_alternatives", "on_prefill")
        refused_or_taken(
            {name: ask(name) for name in names}
            | {
                "strength": lambda value: stream.adjust(strength=value),
                "weights": lambda value: stream.adjust(weights=value),
            }
        )


def test_of_loading(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def load(name: str) -> Act:
        def close(value: Any) -> None:
            Amulet.load(**{"path": tiny("llama"), "n_ctx": 256, "n_threads": 1, name: value}).close()

        return close

    def serve(name: str) -> Act:
        def close(value: Any) -> None:
            AmuletService(tiny("llama"), **{"n_ctx": 256, "n_threads": 1, name: value}).close()

        return close

    names = [name for name in LOADING if name != "model"]
    refused_or_taken(
        {name: load(name) for name in ("n_sequences", *names)}
        | {name: serve(name) for name in ("max_waiting", "n_sequences")}
    )
