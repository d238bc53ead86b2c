"""Types of the fixtures in `conftest`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model

Tiny = Callable[[str], Path]
Load = Callable[[str], Model]
MakeContext = Callable[..., Context]
