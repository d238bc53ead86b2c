"""What the README shows must work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from serving import serving

from amulet_gguf.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def with_help(text: str) -> str:
    """Return a text with the help of each command that a comment names behind it."""
    text = re.sub(r"(<!-- help:.*? -->)\n+```\n.*?\n```(?=\n)", r"\1", text, flags=re.DOTALL)

    def show(match: re.Match[str]) -> str:
        arguments = [*match[1].split(), "--help"]
        shown = CliRunner().invoke(main, arguments, prog_name="amulet", terminal_width=90).output
        return f"{match[0]}\n\n```\n$ amulet {' '.join(arguments)}\n{shown.strip()}\n```"

    return re.sub(r"<!-- help:(.*?) -->", show, text)


def test_the_help_shown_is_the_help_given() -> None:
    text = README.read_text("utf-8")
    expected = with_help(text)
    if os.environ.get("AMULET_UPDATE_README"):
        README.write_text(expected, "utf-8")
    else:
        assert text == expected, "run AMULET_UPDATE_README=1 scripts/test tests/test_readme.py"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.mark.model
def test_the_python_example_runs() -> None:
    code = next(code for code in python_blocks() if "Amulet.load" in code)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Timings(" in done.stdout


@pytest.mark.model
def test_the_example_of_the_service_runs() -> None:
    code = next(code for code in python_blocks() if "AmuletService" in code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "completion_tokens=40" in done.stdout


@pytest.mark.model
def test_the_example_of_the_server_runs(real_model: Path) -> None:
    code = next(code for code in python_blocks() if "OpenAI" in code)
    with serving(real_model, n_ctx=512, n_threads=None) as running:
        assert "http://127.0.0.1:8080" in code
        code = code.replace("http://127.0.0.1:8080", running.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10


@pytest.mark.model
def test_the_commands_of_llm_run(tmp_path: Path) -> None:
    shown = re.findall(r"^llm (.*)$", README.read_text("utf-8"), re.MULTILINE)
    assert len(shown) == 2
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "AMULET_HOME": str(tmp_path)}
    for line in shown:
        short = [*shlex.split(line), "-o", "max_tokens", "12"]
        done = subprocess.run(
            [sys.executable, "-m", "llm", *short],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.model
def test_the_first_answer_shown_is_the_first_answer_given() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (shown,) = re.findall(r"Real output of the first one:\n\n```\n(.*?)```", text, re.DOTALL)
    command = [sys.executable, "-m", "amulet_gguf", "generate", "How do I ask for a raise?"]
    done = subprocess.run(
        [*command, "--prefer", "uplifting"], capture_output=True, text=True, check=True
    )
    # Other processors round differently, so only the beginning is compared.
    assert done.stdout.split()[:2] == shown.split()[:2]
