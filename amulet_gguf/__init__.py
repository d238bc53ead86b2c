"""Realign quantized GGUF models to your preferences while they write, offline.

from amulet_gguf import Amulet

with Amulet.load() as amulet:
    print(amulet.generate("How do I ask for a raise?", prefer="uplifting").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from amulet_gguf.amulet import Amulet
    from amulet_gguf.engine.answer import Answer, Piece, Timings, Usage
    from amulet_gguf.errors import (
        AmuletError,
        ClosedError,
        EngineError,
        ModelError,
        ModelFormatError,
        ModelNotFoundError,
        NonFiniteLogitsError,
        PromptError,
        PromptTooLongError,
        QueueFullError,
        SettingError,
    )
    from amulet_gguf.method.realign import combine, strength
    from amulet_gguf.preferences import PRESETS, Preference
    from amulet_gguf.service.service import AmuletService
    from amulet_gguf.service.stream import ServiceStream
    from amulet_gguf.settings import Settings
    from amulet_gguf.stream import Stream

__all__ = [
    "PRESETS",
    "Amulet",
    "AmuletError",
    "AmuletService",
    "Answer",
    "Call",
    "ClosedError",
    "EngineError",
    "ModelError",
    "ModelFormatError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "Piece",
    "Preference",
    "PromptError",
    "PromptTooLongError",
    "QueueFullError",
    "ServiceStream",
    "SettingError",
    "Settings",
    "Stream",
    "TemplateLimitError",
    "Timings",
    "Tools",
    "Usage",
    "combine",
    "strength",
]

# Imported when first used, because llama.cpp and Numba take most of a second.
_HOMES = {
    "amulet": ("Amulet",),
    "stream": ("Stream",),
    "engine.answer": ("Answer", "Call", "Piece", "Timings", "Usage"),
    "preferences": ("PRESETS", "Preference"),
    "method.realign": ("combine", "strength"),
    "prompts.tools": ("Tools",),
    "service.service": ("AmuletService",),
    "service.stream": ("ServiceStream",),
    "settings": ("Settings",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = importlib.import_module(f"amulet_gguf.{_HOME_OF.get(name, 'errors')}")
        return getattr(module, name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("amulet-gguf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
