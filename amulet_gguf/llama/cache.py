"""The types of number that a KV cache can hold, and which of them a model can have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from amulet_gguf.errors import SettingError

if TYPE_CHECKING:
    from amulet_gguf.llama.gguf import Header


class CacheType(NamedTuple):
    """A type of number.

    Attributes:
        kind: ggml's `ggml_type`.
        size: numbers in a block of it; those of quantized types share a scale.
        n_bytes: of a block.
    """

    kind: int
    size: int
    n_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.size > 1


#: By llama.cpp's names.
CACHE_TYPES: Final = {
    "f16": CacheType(kind=1, size=1, n_bytes=2),
    "q8_0": CacheType(kind=8, size=32, n_bytes=34),
    "q4_0": CacheType(kind=2, size=32, n_bytes=18),
}


def head_sizes(model: Header) -> tuple[int, int]:
    """Return how many numbers the keys and the values of a head of attention have; 0 without heads."""
    n_heads = max(model.per_layer("attention.head_count", 0), default=0)
    size = model.number("embedding_length") // n_heads if n_heads > 0 else 0
    return model.number("attention.key_length", size), model.number("attention.value_length", size)


def check_cache_type(model: Header, cache_type: str) -> None:
    """See whether the caches of a model can be of a type.

    States of recurrent layers are kept in float32 whatever it is, so that models of them alone take all.

    Raises:
        SettingError: they cannot, or there is no such type.
    """
    if cache_type not in CACHE_TYPES:
        known = ", ".join(CACHE_TYPES)
        raise SettingError(f"cache_type must be one of {known}, got {cache_type!r}", "cache_type")
    if (fault := fault_of(model, cache_type)) is not None:
        raise SettingError(
            f"a KV cache of {cache_type} is not possible with this {model.architecture} model, {fault}: "
            "leave cache_type at f16",
            "cache_type",
        )


def fault_of(model: Header, cache_type: str) -> str | None:
    """Tell why the caches of a model cannot be of a type; None: they can."""
    kind = CACHE_TYPES[cache_type]
    if not kind.is_quantized:
        return None
    if model.architecture == "grok":
        return "for which llama.cpp has no flash attention"
    if model.number("attention.indexer.key_length"):
        return "whose attention picks by an index of its own, with which that was never tried"
    keys, values = head_sizes(model)
    swa = (
        model.number("attention.key_length_swa", keys),
        model.number("attention.value_length_swa", values),
    )
    for size in (keys, values, *swa):
        if size % kind.size:
            return f"whose heads have {size} numbers, not a multiple of {kind.size}"
    return None
