"""A program that is not Python starts itself; `scripts/freeze` tries it with really frozen ones."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomlkit
from fixture_types import Tiny

from amulet_gguf.system import child

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a script that is started as a program")

SUPPORT = "from amulet_gguf.system.child import freeze_support"
GREEDY = "{{ 'x'.center(900000000) }}"
#: Says what it is, unless it is a child, and what comes of a template and of files.
PROGRAM = """
import sys
from datetime import datetime
from pathlib import Path

sys.frozen, sys.executable = True, __file__
freeze_support()

from amulet_gguf.errors import AmuletError
from amulet_gguf.system.child import can_start_children
from amulet_gguf.models.trial import try_out
from amulet_gguf.prompts.sandbox import Renderer

print("the program", *sys.argv[1:])
print("has children" if can_start_children() else "has none")
for source in ("{{ messages[0].content }}", GREEDY):
    try:
        print(Renderer(source).render([{"content": "é"}], datetime.now(), {}))
    except AmuletError as error:
        print(error)
for path in filter(Path.exists, map(Path, sys.argv[1:])):
    try:
        try_out(path)
    except AmuletError as error:
        print(error)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program, frozen as far as it knows, in a path with a space."""
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "home"))
    path = tmp_path / "two words" / "copywriter"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nGREEDY = {GREEDY!r}\n{SUPPORT}{PROGRAM}", "utf-8")
    path.chmod(0o755)
    return path


def lines(program: Path, *arguments: object) -> list[str]:
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux alone")
def test_templates_and_files_are_tried_in_children(program: Path, tiny: Tiny, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny("llama").read_bytes().replace(b"<0xFE>", b"<0xFF>", 1))
    first, *said = lines(program, tiny("llama"), bad)
    assert first == f"the program {tiny('llama')} {bad}"
    assert said[:2] == ["has children", "é"]
    assert "192 MiB" in said[2]
    assert "bad.gguf ends llama.cpp" in said[3]
    assert len(said) == 4
    assert len(list((tmp_path / "home" / "tried").iterdir())) == 1


def test_without_support_it_is_not_started_again(program: Path, tiny: Tiny, tmp_path: Path) -> None:
    text = program.read_text("utf-8").replace(GREEDY, "").replace(SUPPORT, "freeze_support = int")
    program.write_text(text, "utf-8")
    assert lines(program, tiny("llama"))[1:] == ["has none", "é", ""]
    assert not (tmp_path / "home" / "tried").exists()


def test_other_arguments_are_the_programs_own(program: Path) -> None:
    for arguments in ([child.CHILD], [child.CHILD, "other"], ["rendering", child.CHILD]):
        assert lines(program, *arguments)[0] == " ".join(["the program", *arguments])


def test_python_does_not_become_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["python", child.CHILD, "rendering"])
    child.freeze_support()
    assert child.can_start_children()
    assert child.frozen_command("rendering") is None


def test_pyinstaller_finds_the_hooks() -> None:
    project = tomlkit.parse((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")).unwrap()
    (value,) = project["project"]["entry-points"]["pyinstaller40"].values()
    (folder,) = map(Path, EntryPoint("hooks", value, "").load()())
    assert (folder / "hook-amulet_gguf.py").exists()
    for scripts in ast.literal_eval((folder / "rthooks.dat").read_text("utf-8")).values():
        assert all((folder / "rthooks" / script).exists() for script in scripts)
