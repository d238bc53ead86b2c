"""Thoughts as people see them: the bundled model, with a chat template that opens a thought."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from amulet_gguf.cli import main
from amulet_gguf.prompts.sandbox import CHATML

QUESTION = "Why is the sky blue?"
TEMPLATE = CHATML.replace("assistant\n", "assistant\n<think>\n")
pytestmark = pytest.mark.model


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    path = tmp_path / "thinks.jinja"
    path.write_text(TEMPLATE, "utf-8")
    return str(path)


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def test_the_answer_alone_goes_to_stdout(template: str) -> None:
    told = ["generate", QUESTION, "--chat-template", template, "--think-tokens", "6", "-n", "8"]
    record = json.loads(run(*told, "--json").stdout)
    assert record["thought"].strip()
    assert record["usage"]["completion_tokens"] - record["usage"]["thought_tokens"] == 8
    shown = run(*told, "--show-thoughts")
    assert shown.stdout.strip() == record["text"].strip()
    assert shown.stderr.strip() == record["thought"].strip()
    assert "\x1b" not in shown.stderr
    for hidden in (run(*told), run(*told, "--hide-thoughts")):
        assert hidden.stdout == shown.stdout
        assert hidden.stderr == ""
    at_once = run(*told, "--no-think", "--show-thoughts")
    assert at_once.stderr == ""
    assert at_once.stdout != shown.stdout


def test_a_chat_folds_thoughts_and_forgets_them(template: str) -> None:
    """What was thought is not said again: the next prompt grows by the answer alone."""
    command = [sys.executable, "-m", "amulet_gguf", "chat", "--chat-template", template]
    typed = f"{QUESTION}\n/thoughts\n/set think false\nAnd at night?\n/thoughts\n"
    done = subprocess.run(
        [*command, "--think-tokens", "6", "-n", "8"],
        input=typed,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("thought for") == 1
    assert "/thoughts shows it" in done.stderr
    assert "there was no thought" in done.stderr
    thought = done.stderr.split("shows it]")[1].strip().splitlines()[0]
    assert len(thought) > 10
    assert thought not in done.stdout


def test_explanations_and_comparisons_are_of_the_answer(template: str) -> None:
    options = ["--chat-template", template, "--think-tokens", "9", "-n", "6", "-p", "concise", "-s", "3"]
    record = json.loads(run("explain", QUESTION, *options, "--json").stdout)
    assert "".join(token["text"] for token in record["tokens"]).strip() == record["text"].strip()
    compared = json.loads(run("compare", QUESTION, *options, "--json").stdout)
    for method in compared.values():
        assert "".join(text for text, _ in method["pieces"]) == method["text"]


def test_a_batch_keeps_thoughts_in_a_field_of_their_own(template: str, tmp_path: Path) -> None:
    asked, done = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "Hi"}\n{"prompt": "Hi", "think": false, "thought": "mine"}\n')
    options = ["--chat-template", template, "--think-tokens", "9", "-n", "5"]
    assert run("batch", str(asked), "-o", str(done), *options).exit_code == 0
    first, second = map(json.loads, done.read_text().splitlines())
    assert first["thought"].strip()
    assert first["text"] != second["text"]
    assert "thought" not in second
