"""Models on this machine, and those that can be fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amulet_gguf.models.find import Installed, bundled_model, find_model, installed

__all__ = ["Installed", "bundled_model", "find_model", "installed"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before it is needed: the catalogue alone is read at once
        from amulet_gguf.models import find

        return getattr(find, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
