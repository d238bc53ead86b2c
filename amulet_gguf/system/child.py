"""Child processes of a program that may be frozen.

Chat templates are rendered and new model files tried in processes of their own. Where the program is
Python, that is started again. A frozen one starts itself, with a private argument, and `freeze_support`
makes it the child before it becomes anything else.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Final

import platformdirs

#: The argument. Behind it follow the name of a program and the program's own arguments.
CHILD: Final = "--amulet-child"
_PROGRAMS: Final = {
    "rendering": "amulet_gguf.prompts.rendering",
    "trial": "amulet_gguf.models.trial",
}
_is_supported = False


def freeze_support() -> None:
    """Be a child, and end, if this process was started as one: call it first in a frozen program.

    PyInstaller's hook does. What is frozen with something else and does not has no children: templates
    are then rendered without bounds, and model files loaded untried. Python itself it leaves alone.
    """
    global _is_supported
    if not getattr(sys, "frozen", False):
        return
    _is_supported = True
    # Not into the application, which may be signed: where Numba goes if it cannot write there.
    os.environ.setdefault("NUMBA_CACHE_DIR", platformdirs.user_cache_dir("numba", appauthor=False))
    if len(sys.argv) > 2 and sys.argv[1] == CHILD and sys.argv[2] in _PROGRAMS:
        del sys.argv[:2]
        runpy.run_module(_PROGRAMS[sys.argv[0]], run_name="__main__")
        sys.exit()


def can_start_children() -> bool:
    """Tell whether this program is Python, or frozen with `freeze_support`."""
    if getattr(sys, "frozen", False):
        return _is_supported
    return "py" in Path(sys.executable or "").stem.lower()  # and not what merely holds a Python


def frozen_command(name: str, *arguments: str) -> list[str] | None:
    """Return what starts a child of a frozen program; None where Python is to be started."""
    return [sys.executable, CHILD, name, *arguments] if _is_supported else None
