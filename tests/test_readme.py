"""What the README shows must work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

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


@pytest.mark.model
def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Timings(" in done.stdout


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
