"""How much memory (RAM) a model will take, told from its file before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from amulet_gguf.errors import EngineError
from amulet_gguf.llama.gguf import Header, parts, read_header, shown

#: Context of a model that could take more: the memory of a cache grows with it.
DEFAULT_N_CTX: Final = 4096
#: The smallest context; all are a multiple of it.
MIN_N_CTX: Final = 256
# Python, numba and LLVM take 110 MB. The rest was fitted to what `amulet bench` measured: 188 MB beyond
# model and cache with V = 49,152, and 251 MB with V = 151,936.
_BASE: Final = 158_000_000
_PER_TOKEN_OF_VOCABULARY: Final = 613


@dataclass(frozen=True)
class Estimate:
    """Bytes of RAM that a loaded model takes.

    Attributes:
        weights: the file or files.
        cache: keys and values in float16, as if all layers attended to all of the context.
        work: everything else, roughly.
    """

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


def estimate(header: Header, weights: int, n_ctx: int, n_sequences: int) -> Estimate:
    """Estimate the memory of a model with a context of n_ctx tokens for each of its sequences.

    Args:
        weights: bytes of the file or files.
    """
    return Estimate(
        weights=weights,
        cache=cache_bytes(header, -(-n_ctx // MIN_N_CTX) * MIN_N_CTX, n_sequences),
        work=_BASE + _PER_TOKEN_OF_VOCABULARY * header.n_vocab,
    )


def cache_bytes(header: Header, n_ctx: int, n_sequences: int) -> int:
    """Estimate keys and values, as if all layers attended to all of the context (in float16).

    The state of a recurrent layer, which does not grow with the context, is left out.
    """
    heads = header.per_layer("attention.head_count", 1)
    head_size = header.number("embedding_length") // max(1, max(heads, default=1))
    sizes = header.number("attention.key_length", head_size)
    sizes += header.number("attention.value_length", head_size)
    kv_heads = header.per_layer("attention.head_count_kv", max(heads, default=1))
    return sum(kv_heads) * sizes * 2 * n_ctx * n_sequences


def check_fits(path: Path, n_ctx: int | None, n_sequences: int, available: int | None = None) -> None:
    """Refuse a model that the machine cannot hold, before it is loaded.

    Args:
        n_ctx: tokens per sequence; None: `DEFAULT_N_CTX`, or what the model can if less.
        available: bytes; None: what the system says.

    Raises:
        EngineError: with the numbers, and the nearest setting that would fit.
        ModelNotFoundError, ModelFormatError: the file cannot be read.
    """
    header = read_header(path)
    n_ctx = n_ctx or min(DEFAULT_N_CTX, header.n_ctx_train or DEFAULT_N_CTX)
    weights = sum(part.stat().st_size for part in parts(path))
    if available is None:
        available = psutil.virtual_memory().available
    needed = estimate(header, weights, n_ctx, n_sequences)
    if needed.total <= available:
        return
    per_cell = estimate(header, weights, MIN_N_CTX, n_sequences).cache
    spare = available - needed.weights - needed.work
    largest = spare // per_cell * MIN_N_CTX if per_cell else 0
    if largest >= MIN_N_CTX:
        cure = f"it would fit with --n-ctx {largest}"
    elif n_sequences > 1 and spare >= estimate(header, weights, MIN_N_CTX, 1).cache:
        cure = f"it would fit with --n-ctx {MIN_N_CTX} and fewer preferences"
    else:
        cure = "choose a smaller model or quantization, or close other programs"
    name = shown(Path(path.name))
    raise EngineError(
        f"{name} would need {_gb(needed.total)} GB (weights {_gb(needed.weights)}, cache of "
        f"{n_sequences} x {n_ctx} tokens {_gb(needed.cache)}, work {_gb(needed.work)}) and "
        f"{_gb(available)} GB are free: {cure}"
    )


def check_cache(n_bytes: int, n_ctx: int, n_sequences: int) -> None:
    """Refuse a cache that the machine cannot hold: the system might end the process instead.

    Raises:
        EngineError: with what would help.
    """
    available = psutil.virtual_memory().available
    if n_bytes > available:
        raise EngineError(
            f"the cache of {n_sequences} x {n_ctx} tokens needs {n_bytes / 1e9:.1f} GB and "
            f"{available / 1e9:.1f} GB of memory are free: lower n_ctx or the number of preferences"
        )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f}"
