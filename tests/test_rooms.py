"""The house has floors: imports only go down, nothing goes in circles, and no room is crowded."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import amulet_gguf

PACKAGE = Path(amulet_gguf.__file__).parent

#: Ground floor first. Modules directly in the package stand where they are named.
FLOORS = [
    "errors", "preferences", "declaration", "settings", "methods", "method", "system", "llama",
    "engine", "prompts", "stream", "home", "models", "amulet", "taste", "conversation", "service",
    "batch", "llm_plugin", "checks", "evaluation", "server", "cli", "__main__",
]  # fmt: skip
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of the package that a module imports anywhere: at its top, in functions, for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            source = node.module or ""
            names = [f"{source}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else source for name in names)
    return frozenset(found & MODULES.keys() - {module})


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_only_go_down(module: str) -> None:
    lazy = {"amulet_gguf"}  # the face itself: names are looked up when they are used
    above = {other for other in imports(module) - lazy if floor(other) > floor(module)}
    assert not above


def test_nothing_is_imported_in_a_circle() -> None:
    # What a package's own file offers is imported when it is asked for, from the modules in it.
    edges = {
        module: {other for other in imports(module) if not MODULES[other].name.startswith("__init__")}
        for module in MODULES
        if not MODULES[module].name.startswith("__init__")
    }
    while edges:
        free = [module for module, others in edges.items() if not others & edges.keys()]
        assert free, f"a circle among {sorted(edges)}"
        for module in free:
            del edges[module]


def test_rooms_are_not_crowded() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    long = {name for name, path in MODULES.items() if len(path.read_text("utf-8").splitlines()) > 400}
    assert not long
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= set(FLOORS)


def test_the_map_of_the_readme_shows_every_room_in_the_order_of_the_floors() -> None:
    readme = (PACKAGE.parent / "README.md").read_text("utf-8")
    shown = re.findall(r"^\| `(\w+)/` \|", readme, re.MULTILINE)
    rooms = [name for name in FLOORS if (PACKAGE / name).is_dir()]
    assert shown == rooms
