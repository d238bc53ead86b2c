"""What the documents show must work, and what they point to must be there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from serving import serving

from amulet_gguf.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
COMMANDS = ROOT / "amulet_gguf" / "cli" / "README.md"
GUIDES = sorted((ROOT / "amulet_gguf").rglob("*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("models/*.md"), *GUIDES])
#: Words by which the tests below find the Python examples that they run.
EXAMPLES = ("amulet.stream", "AmuletService", "Tools", "OpenAI")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


# Help


def with_help(text: str) -> str:
    """Return a text with the help of each command that a comment names behind it."""
    text = re.sub(r"(<!-- help:.*? -->)\n+```\n.*?\n```(?=\n)", r"\1", text, flags=re.DOTALL)

    def show(match: re.Match[str]) -> str:
        arguments = [*match[1].split(), "--help"]
        shown = CliRunner().invoke(main, arguments, prog_name="amulet", terminal_width=90).output
        return f"{match[0]}\n\n```\n$ amulet {' '.join(arguments)}\n{shown.strip()}\n```"

    return re.sub(r"<!-- help:(.*?) -->", show, text)


def commands(command: click.Command, *path: str) -> Iterator[str]:
    """Yield the arguments that lead to a command and to those under it."""
    yield " ".join(path)
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, *path, name)


@each_document
def test_the_help_shown_is_the_help_given(document: Path) -> None:
    text = document.read_text("utf-8")
    expected = with_help(text)
    if os.environ.get("AMULET_UPDATE_HELP"):
        document.write_text(expected, "utf-8")
    else:
        assert text == expected, "run AMULET_UPDATE_HELP=1 scripts/test tests/test_documents.py"


def test_every_command_has_its_help_in_the_guide() -> None:
    shown = re.findall(r"<!-- help:(.*?) -->", COMMANDS.read_text("utf-8"))
    assert sorted(name.strip() for name in shown) == sorted(commands(main))


# Form


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 230


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_guides_are_part_of_the_package() -> None:
    assert len(GUIDES) >= 6
    for guide in GUIDES:
        package = ".".join(guide.parent.relative_to(ROOT).parts)
        assert (resources.files(package) / guide.name).read_text("utf-8").startswith("# ")


# Examples


def python_blocks() -> list[str]:
    return [
        code
        for document in DOCUMENTS
        for code in re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.DOTALL)
    ]


def example(word: str) -> str:
    (code,) = (code for code in python_blocks() if word in code)
    return code


def test_every_python_example_is_run_below() -> None:
    assert sorted(python_blocks()) == sorted(example(word) for word in EXAMPLES)


@pytest.mark.model
def test_the_python_example_runs() -> None:
    code = example("amulet.stream")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Timings(" in done.stdout


@pytest.mark.model
def test_the_example_of_functions_runs() -> None:
    code = example("Tools")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[Call(name='get_weather', arguments='{" in done.stdout


@pytest.mark.model
def test_the_example_of_the_service_runs() -> None:
    code = example("AmuletService")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "completion_tokens=40" in done.stdout


@pytest.mark.model
def test_the_example_of_the_server_runs(real_model: Path) -> None:
    code = example("OpenAI")
    with serving(real_model, n_ctx=512, n_threads=None) as running:
        assert "http://127.0.0.1:8080" in code
        code = code.replace("http://127.0.0.1:8080", running.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10


@pytest.mark.model
def test_the_commands_of_llm_run(tmp_path: Path) -> None:
    shown = [
        line
        for document in DOCUMENTS
        for line in re.findall(r"^llm (.*)$", document.read_text("utf-8"), re.MULTILINE)
    ]
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
    text = README.read_text("utf-8")
    assert "answers as above at S = 1" in text
    (shown,) = re.findall(r"^\| 1 \| (.*) \|$", text, re.MULTILINE)
    command = [sys.executable, "-m", "amulet_gguf", "generate", "How do I ask for a raise?"]
    done = subprocess.run(
        [*command, "--prefer", "uplifting", "-n", "60"], capture_output=True, text=True, check=True
    )
    # Other processors round differently, so only the beginning is compared.
    assert done.stdout.split()[:2] == shown.split()[:2]
