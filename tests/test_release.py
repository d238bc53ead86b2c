"""What is released: one version, and a wheel that holds what is used and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from amulet_gguf import __version__

ROOT = Path(__file__).parent.parent
#: What lies in the package beside Python: guides and their pictures, the page, templates of pages.
SUFFIXES = {".py", ".typed", ".md", ".svg", ".html", ".css", ".js", ".jinja", ".txt", ".dat"}


def test_the_version_is_that_of_the_newest_changes_and_of_the_tag() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == version
    assert __version__ == version  # of what is installed
    if (git := shutil.which("git")) and (ROOT / ".git").exists():
        command = [git, "tag", "--points-at", "HEAD"]
        tags = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
        assert not tags or f"v{version}" in tags


def test_the_version_is_written_in_one_place() -> None:
    for path in (ROOT / "amulet_gguf").rglob("*.py"):
        assert f'"{__version__}"' not in path.read_text("utf-8"), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "wheel",
        "--directory",
        str(folder),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "amulet_gguf").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {Path(name).suffix for name in here} == SUFFIXES
    about = f"amulet_gguf-{__version__}.dist-info/"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(about)}
    assert held == here
    assert wheel.stat().st_size < 2**20


def test_the_wheel_offers_what_other_programs_look_for(wheel: Path) -> None:
    about = f"amulet_gguf-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        points = archive.read(f"{about}/entry_points.txt").decode()
        metadata = archive.read(f"{about}/METADATA").decode()
    for line in ("amulet = amulet_gguf.cli:main", "[llm]\namulet = amulet_gguf.llm_plugin"):
        assert line in points
    assert "Requires-Python: >=3.10" in metadata
    assert "License-File: LICENSE" in metadata
