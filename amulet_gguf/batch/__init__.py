"""Many prompts, resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amulet_gguf.batch.run import BatchSize, answers, result, size_batch

__all__ = ["BatchSize", "answers", "result", "size_batch"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before it is needed: records are read without a model
        from amulet_gguf.batch import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
