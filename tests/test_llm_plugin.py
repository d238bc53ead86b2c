"""The plugin for `llm`, through its Python API and its command."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llm
import pytest
from fixture_types import Tiny

from amulet_gguf import llm_plugin
from amulet_gguf.amulet import Amulet
from amulet_gguf.prompts.sandbox import CHATML

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = {
    "prefer": "concise; Write for a child.:0.5", "strength": 3, "max_tokens": 12,
    "temperature": 0.8, "seed": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    yield
    for service in llm_plugin._loaded.values():
        service.close()
    llm_plugin._loaded.clear()


@pytest.fixture
def options(tiny: Tiny) -> dict[str, Any]:
    return {**OPTIONS, "model": str(tiny("llama")), "n_ctx": 512}


@pytest.fixture
def expected(tiny: Tiny) -> str:
    settings = {**OPTIONS, "prefer": ["concise", "Write for a child.:0.5"]}
    with Amulet.load(tiny("llama"), n_ctx=512) as amulet:
        return amulet.generate("How are you?", **settings).text


def test_a_prompt_gets_the_answer_of_the_model(options: dict[str, Any], expected: str) -> None:
    model = llm_plugin.AmuletModel()
    streamed = model.prompt("How are you?", **options)
    assert list(streamed) == [text for text in streamed._chunks if text]
    assert streamed.text() == expected
    assert model.prompt("How are you?", stream=False, **options).text() == expected
    assert streamed.output_tokens == 12
    assert len(llm_plugin._loaded) == 1

    async def ask() -> str:
        return str(await llm_plugin.AmuletAsyncModel().prompt("How are you?", **options).text())

    assert asyncio.run(ask()) == expected


def test_thoughts_are_reasoning(options: dict[str, Any], tmp_path: Path) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text(CHATML.replace("assistant\n", "assistant\n<think>\n"), "utf-8")
    told = {**options, "chat_template": str(template), "think_tokens": 8}
    response = llm_plugin.AmuletModel().prompt("How are you?", **told)
    events = list(response.stream_events())  # type: ignore[no-untyped-call]
    thought = "".join(event.chunk for event in events if event.type == "reasoning")
    text = "".join(event.chunk for event in events if event.type == "text")
    assert thought.strip()
    assert text == response.text()
    assert thought not in text

    async def ask() -> str:
        return str(await llm_plugin.AmuletAsyncModel().prompt("How are you?", **told).text())

    assert asyncio.run(ask()) == text


def test_a_conversation_is_sent_whole_with_its_system_prompt(options: dict[str, Any]) -> None:
    conversation = llm_plugin.AmuletModel().conversation()
    first = conversation.prompt("How are you?", system="Be kind.", **options)
    first.text()
    second = conversation.prompt("And then?", **options)
    second.text()
    assert first.input_tokens is not None
    assert first.output_tokens is not None
    assert second.input_tokens is not None
    assert second.input_tokens > first.input_tokens + first.output_tokens
    alone = llm_plugin.AmuletModel().prompt("And then?", **options)
    alone.text()
    assert alone.input_tokens is not None
    assert second.input_tokens > alone.input_tokens


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"strength": 1e9}, "strength must be"),
        ({"placement": "x"}, "placement must be"),
        ({"prefer": "concice"}, "did you mean"),
        ({"profile": "nosuch"}, "there is no profile"),
        ({"model": "/nowhere.gguf"}, "nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(options: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    with pytest.raises(llm.ModelError, match=message) as caught:
        llm_plugin.AmuletModel().prompt("x", **{**options, **bad}).text()
    assert "\n" not in str(caught.value)


def test_a_profile_goes_before_the_defaults(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[profiles.short]\nmax_tokens = 2\nstrength = 2.0\n")
    del options["max_tokens"], options["strength"]
    short = llm_plugin.AmuletModel().prompt("x", profile="short", **options)
    short.text()
    assert short.output_tokens == 2


def test_an_answer_that_is_left_frees_the_model(options: dict[str, Any]) -> None:
    answer = iter(llm_plugin.AmuletModel().prompt("x", **{**options, "max_tokens": 400}))
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    (service,) = llm_plugin._loaded.values()
    assert llm_plugin.AmuletModel().prompt("y", **options).text()
    assert service.n_live + service.n_waiting == 0


@pytest.fixture
def command(tmp_path: Path) -> Any:
    """Run `llm` where the package counts as installed, whatever the environment says."""
    info = tmp_path / "site" / "amulet_plugin_test-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: amulet-plugin-test\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[llm]\namulet = amulet_gguf.llm_plugin\n")
    path = os.pathsep.join([str(info.parent), str(ROOT)])
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path / "user"), "PYTHONPATH": path}
    environment["LLM_LOAD_PLUGINS"] = "amulet-plugin-test"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    return run


def test_the_command_answers_and_goes_on(command: Any, options: dict[str, Any], expected: str) -> None:
    typed = [part for name, value in options.items() for part in ("-o", name, str(value))]
    done = command("-m", "amulet", *typed, "How are you?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == expected.rstrip("\n")
    again = command("-c", "--usage", *typed, "And then?")
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip()
    bad = command("-m", "amulet", "-o", "strength", "1e9", "x")
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
    assert "strength" in bad.stderr


def test_listing_models_loads_nothing_heavy(command: Any) -> None:
    done = command("models")
    assert "Amulet: amulet" in done.stdout
    heavy = "[name for name in ('llama_cpp', 'numba') if name in sys.modules]"
    code = f"import sys, amulet_gguf.llm_plugin; print({heavy})"
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert light.stdout.strip() == "[]"


def test_the_entry_point_names_the_plugin() -> None:
    assert 'amulet = "amulet_gguf.llm_plugin"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert callable(llm_plugin.register_models)
