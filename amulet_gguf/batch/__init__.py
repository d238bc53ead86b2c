"""Many prompts, resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amulet_gguf.batch.run import Plan, answers, plan_batch, result

__all__ = ["Plan", "answers", "plan_batch", "result"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before it is needed: records are read without a model
        from amulet_gguf.batch import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
