"""Conversations, live and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amulet_gguf.conversation.turns import Conversation

__all__ = ["Conversation"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before it is needed: saved conversations are listed without a model
        from amulet_gguf.conversation import turns

        return getattr(turns, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
