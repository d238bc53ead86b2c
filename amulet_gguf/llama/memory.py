"""How much memory (RAM) a model will take, told from its file before it is loaded.

What llama.cpp allocates follows from the file's metadata: the cache exactly, the working space nearly,
by the largest of the steps of a layer. Sizes are of a CPU, where it is the RAM that counts.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from amulet_gguf.errors import EngineError
from amulet_gguf.llama.available import available_bytes
from amulet_gguf.llama.cache import CACHE_TYPES, fault_of, head_sizes
from amulet_gguf.llama.gguf import Header, Tensor, read_header, read_model, shown, size

#: Context of a model that could take more: the memory of a cache grows with it.
DEFAULT_N_CTX: Final = 4096
#: The smallest context; all are a multiple of it.
MIN_N_CTX: Final = 256
#: Rows of one decode on a CPU, if nobody chose.
DEFAULT_N_BATCH: Final = 128
_OUTPUTS: Final = 16  # rows of logits that the engine has made, for drafts
#: Python, NumPy, Numba and llama.cpp's library: there before a model is loaded.
_PROGRAM: Final = 115_000_000
_KERNELS: Final = 75_000_000  # compiled, and what the first answer imports
_PER_TOKEN_OF_VOCABULARY: Final = 150

#: Bytes of a block and numbers in it, of the types that llama.cpp repacks, by ggml's number of the type.
_BLOCKS: Final = {
    2: (18, 32), 3: (20, 32), 8: (34, 32), 10: (84, 256), 12: (144, 256), 13: (176, 256),
    14: (210, 256), 20: (18, 32), 23: (136, 256), 39: (17, 32),
}  # fmt: skip
#: The types that it repacks (llama.cpp's `repack.cpp` and `amx`), by the feature of a processor.
_REPACKED: Final = {
    "AVX2": {2, 12, 20, 39},
    "AVX512": {10},
    "DOTPROD": {2, 8, 12, 13, 14, 20, 39},
    "AMX_INT8": {2, 3, 8, 12, 13, 14, 23},
}


@dataclass(frozen=True)
class Estimate:
    """Bytes of RAM that a process with a loaded model takes, at most.

    Attributes:
        weights: the file or files, mapped into memory.
        repacked: of them, what llama.cpp copies into the order that this processor likes best. The
            original is not read again, and the system can take its memory back.
        cache: keys and values of all sequences, and the state of recurrent layers.
        compute: llama.cpp's working space, and logits.
        program: everything else: Python, compiled kernels, the vocabulary.
    """

    weights: int
    repacked: int
    cache: int
    compute: int
    program: int

    @property
    def total(self) -> int:
        return self.weights + self.repacked + self.cache + self.compute + self.program

    @property
    def needed(self) -> int:
        """What must be free before the model is loaded."""
        return self.total - self.repacked - _PROGRAM


def estimate(
    path: Path, n_ctx: int, n_sequences: int, n_batch: int | None = None, cache_type: str = "f16"
) -> Estimate:
    """Estimate the memory of a process that has filled the contexts of a model.

    Args:
        path: the model's only or first file.
        n_ctx: tokens of each sequence.
        n_batch: rows of one decode; None: what a context takes by itself.
        cache_type: a name of `CACHE_TYPES`, as for all that follows.

    Raises:
        ModelNotFoundError, ModelFormatError: a file cannot be read.
    """
    model = read_model(path)
    return Estimate(
        weights=size(path),
        repacked=_repacked_bytes(model.tensors),
        cache=cache_bytes(model, n_ctx, n_sequences, cache_type),
        compute=compute_bytes(model, n_ctx, n_sequences, n_batch, cache_type),
        program=_PROGRAM + _KERNELS + _PER_TOKEN_OF_VOCABULARY * model.n_vocab,
    )


def cache_bytes(model: Header, n_ctx: int, n_sequences: int, cache_type: str = "f16") -> int:
    """Return the bytes of a cache: keys and values of tokens, states of sequences in float32.

    Layers with a sliding window are kept whole, too: so that what is cached can be reused.
    """
    layers = _layers(model)
    kv_heads = model.per_layer("attention.head_count_kv", _n_heads(model))
    attending = [heads for layer, heads in zip(layers, kv_heads, strict=True) if layer != "recurrent"]
    n_recurrent = sum(layer != "attending" for layer in layers)
    keys, values = head_sizes(model)
    if model.number("attention.key_length_mla"):
        values = 0  # they are made of the keys
    attending = attending[: max(0, len(attending) - model.number("attention.shared_kv_layers"))]
    value_heads = sum(attending)
    kind = CACHE_TYPES[cache_type]
    if not kind.is_quantized:  # without flash attention, all layers get room for the largest values
        value_heads = max(attending, default=0) * sum(heads > 0 for heads in attending)
    per_token = (keys * sum(attending) + values * value_heads) * kind.n_bytes // kind.size
    return n_sequences * (per_token * _padded(n_ctx) + 4 * n_recurrent * _state_size(model))


def compute_bytes(
    model: Header, n_ctx: int, n_sequences: int, n_batch: int | None = None, cache_type: str = "f16"
) -> int:
    """Estimate llama.cpp's working space, and the logits of its outputs.

    The memory of a step of a layer is used again for the next one, so that the largest counts: scores of
    all heads for all that is cached, or the feed-forward network, or logits. Flash attention, which
    quantized caches need, does without those scores.
    """
    n_ctx = _padded(n_ctx)
    rows = min(n_batch or max(n_sequences, DEFAULT_N_BATCH), n_ctx * n_sequences)
    n_heads = _n_heads(model)
    width = max(
        model.number("embedding_length"),
        n_heads * model.number("attention.key_length"),
        2 * model.number("ssm.inner_size"),
    )
    masks = n_ctx * (2 if model.number("attention.sliding_window") else 1) if n_heads else 0
    experts = model.number("expert_feed_forward_length") * model.number("expert_used_count")
    feed_forward = 3 * max(*model.per_layer("feed_forward_length", 0), experts, 0) + 4 * width
    logits = max(n_sequences, min(rows, _OUTPUTS)) * model.n_vocab
    has_flash = CACHE_TYPES[cache_type].is_quantized
    scores = 0 if has_flash else n_heads * n_ctx
    largest = max(rows * (scores + 6 * width), rows * feed_forward, logits)
    outputs = n_sequences * (model.n_vocab + _state_size(model))
    return 4 * (largest + outputs) + (2 if has_flash else 4) * rows * masks


def check_fits(
    path: Path,
    n_ctx: int | None,
    n_sequences: int,
    n_batch: int | None = None,
    cache_type: str = "f16",
    available: int | None = None,
) -> None:
    """Refuse a model that the machine cannot hold, before it is loaded.

    Args:
        n_ctx: tokens per sequence; None: `DEFAULT_N_CTX`, or what the model can if less.
        n_batch: rows of one decode.
        available: bytes; None: what the system says, and a container's limit.

    Raises:
        EngineError: with the numbers, and the nearest setting that would fit.
        ModelNotFoundError, ModelFormatError: the file cannot be read.
    """
    header = read_header(path)
    n_ctx = n_ctx or min(DEFAULT_N_CTX, header.n_ctx_train or DEFAULT_N_CTX)

    def needed(n_ctx: int, n_sequences: int) -> int:
        return estimate(path, n_ctx, n_sequences, n_batch, cache_type).needed

    most = available_bytes() if available is None else available
    if needed(n_ctx, n_sequences) > most:
        it = estimate(path, n_ctx, n_sequences, n_batch, cache_type)
        work = it.needed - it.weights - it.cache
        cure = _cure(needed, n_ctx, n_sequences, most)
        smaller = estimate(path, n_ctx, n_sequences, n_batch, "q8_0").needed
        if smaller <= most and fault_of(header, "q8_0") is None:
            cure += ", or with --cache-type q8_0"
        raise EngineError(
            f"{shown(Path(path.name))} would need {_gb(it.needed)} GB (weights {_gb(it.weights)}, cache "
            f"of {n_sequences} x {n_ctx} tokens {_gb(it.cache)}, work {_gb(work)}) and {_gb(most)} GB "
            f"are free: {cure}"
        )


def check_context(model: Header, n_ctx: int, n_sequences: int, n_batch: int, cache_type: str) -> None:
    """Refuse a context that the machine cannot hold: the system might end the process instead.

    Raises:
        EngineError: with the nearest setting that would fit.
    """

    def needed(n_ctx: int, n_sequences: int) -> int:
        cache = cache_bytes(model, n_ctx, n_sequences, cache_type)
        return cache + compute_bytes(model, n_ctx, n_sequences, n_batch, cache_type)

    n_bytes, most = needed(n_ctx, n_sequences), available_bytes()
    if n_bytes > most:
        raise EngineError(
            f"a context of {n_sequences} x {n_ctx} tokens needs {_gb(n_bytes)} GB and {_gb(most)} GB of "
            f"memory are free: {_cure(needed, n_ctx, n_sequences, most)}"
        )


def _cure(needed: Callable[[int, int], int], n_ctx: int, n_sequences: int, available: int) -> str:
    sizes = range(MIN_N_CTX, n_ctx, MIN_N_CTX)
    n_fitting = bisect.bisect_right(sizes, available, key=lambda size: needed(size, n_sequences))
    if n_fitting:
        return f"it would fit with --n-ctx {sizes[n_fitting - 1]}"
    if n_sequences > 1 and needed(MIN_N_CTX, 1) <= available:
        return f"it would fit with --n-ctx {MIN_N_CTX} and fewer preferences"
    return "choose a smaller model or quantization, or close other programs"


def _padded(n_ctx: int) -> int:
    return -(-n_ctx // MIN_N_CTX) * MIN_N_CTX


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f}"


def _n_heads(model: Header) -> int:
    return max(model.per_layer("attention.head_count", 1), default=1)


def _layers(model: Header) -> list[str]:
    """Tell of each layer whether it is "attending", "recurrent" or "both"."""
    attends, recurs = set[int](), set[int]()
    for name in model.tensors:
        if match := _LAYER.match(name):
            (attends if match[2] else recurs).add(int(match[1]))
    kinds = {(True, True): "both", (False, True): "recurrent"}
    n_layers = len(model.per_layer("attention.head_count_kv", 0))
    return [kinds.get((n in attends, n in recurs), "attending") for n in range(n_layers)]


#: Tensors that tell the kind of a layer. `attn_qkv` is no sign: recurrent layers may have it, too.
_LAYER: Final = re.compile(r"blk\.(\d+)\.(?:(attn_kv?[_.])|ssm_|shortconv|time_mix)")


def _state_size(model: Header) -> int:
    """Count the numbers that a recurrent layer keeps of a sequence: `n_embd_r`, `n_embd_s`."""
    width = model.number("embedding_length")
    if size := model.number("wkv.head_size"):
        return width * (model.number("token_shift_count", 2) + size)
    if size := model.number("shortconv.l_cache"):
        return width * (size - 1)
    if size := model.number("kda.head_dim"):
        n_heads = _n_heads(model)
        return n_heads * size * (3 * (model.number("ssm.conv_kernel", 4) - 1) + size)
    inner, state = model.number("ssm.inner_size"), model.number("ssm.state_size")
    groups = model.number("ssm.group_count")
    return max(0, model.number("ssm.conv_kernel") - 1) * (inner + 2 * groups * state) + state * inner


def _repacked_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the size of the weights that llama.cpp keeps a second time, in another order."""
    kinds = _repacked_kinds()
    has_output = "output.weight" in tensors  # otherwise it is the embeddings, once more
    return sum(
        math.prod(tensor.shape) * _BLOCKS[tensor.kind][0] // _BLOCKS[tensor.kind][1]
        for name, tensor in tensors.items()
        if tensor.kind in kinds
        and name.endswith(".weight")
        and len(tensor.shape) > 1
        and tensor.shape[1] % 8 == 0
        and not (has_output and name == "token_embd.weight")
    )


@functools.cache
def _repacked_kinds() -> frozenset[int]:
    from amulet_gguf.llama.model import lib

    features = lib.llama_print_system_info().decode("utf-8", "replace")
    has = {part.split("=")[0].split(":")[-1].strip() for part in features.split("|")}
    if "REPACK" not in has:
        has &= {"AMX_INT8"}
    return frozenset().union(*(_REPACKED.get(feature, ()) for feature in has))
