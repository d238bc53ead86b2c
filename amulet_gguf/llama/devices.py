"""Devices beside the CPU that can run layers of a model, and how many layers fit there."""

from __future__ import annotations

import ctypes
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import psutil

from amulet_gguf.llama.gguf import Header, Tensor, read_model
from amulet_gguf.llama.memory import DEFAULT_N_CTX, cache_bytes
from amulet_gguf.llama.model import can_offload, lib
from amulet_gguf.llama.rpc import library

#: Rows of a batch on a device, if nobody chose: work space grows with them.
N_BATCH: Final = 512
_GPU, _IGPU = 1, 2  # enum ggml_backend_dev_type
_MARGIN: Final = 2**30  # left to drivers and other programs, as llama.cpp's own tools do
_LAYER: Final = re.compile(r"blk\.([0-9]+)\.")
_INPUT: Final = re.compile(r"token_embd|position_embd|token_types")  # stays on the CPU
_N_OUTPUTS: Final = 16  # rows of logits; an estimate


@dataclass(frozen=True)
class Device:
    """A device that llama.cpp gives layers to.

    Attributes:
        name: short, such as CUDA0.
        description: the maker's name of it.
        free, total: bytes of its memory.
    """

    name: str
    description: str
    free: int
    total: int

    @property
    def room(self) -> int:
        """Bytes that a model may take."""
        return self.free - min(_MARGIN, self.free // 4)

    def __str__(self) -> str:
        gb = f"{self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"
        return f"{self.name} ({self.description}, {gb})"


@dataclass(frozen=True)
class Offload:
    """How much of a model goes to devices.

    Attributes:
        n_layers: how many of its last layers; the output counts as the last.
        of: how many it has.
        n_bytes: what they take there, with their cache and work space.
    """

    n_layers: int
    of: int
    n_bytes: int

    def __str__(self) -> str:
        which = "all" if self.n_layers == self.of else f"{self.n_layers or 'none'} of"
        return f"{which} {self.of} layers ({self.n_bytes / 1e9:.2f} GB)"


def devices() -> list[Device]:
    """Return the devices that llama.cpp spreads layers over, none if there are none.

    Integrated ones are used where there are no others, and share the memory of the machine.
    """
    if not can_offload():
        return []
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    ggml, base = library("ggml"), library("ggml-base")
    count = ctypes.CFUNCTYPE(size)(("ggml_backend_dev_count", ggml))
    get = ctypes.CFUNCTYPE(pointer, size)(("ggml_backend_dev_get", ggml))
    kind = ctypes.CFUNCTYPE(ctypes.c_int, pointer)(("ggml_backend_dev_type", base))
    found = [(kind(device), device) for device in map(get, range(count()))]
    chosen = [device for each, device in found if each == _GPU]
    if chosen:
        return [_ask(device, base) for device in chosen]
    host = psutil.virtual_memory().available
    shared = [_ask(device, base) for each, device in found if each == _IGPU]
    return [Device(each.name, each.description, min(each.free, host), each.total) for each in shared]


def _ask(device: int, base: ctypes.CDLL) -> Device:
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    name = ctypes.CFUNCTYPE(text, pointer)(("ggml_backend_dev_name", base))
    description = ctypes.CFUNCTYPE(text, pointer)(("ggml_backend_dev_description", base))
    number = ctypes.POINTER(size)
    memory = ctypes.CFUNCTYPE(None, pointer, number, number)(("ggml_backend_dev_memory", base))
    free, total = size(), size()
    memory(device, free, total)
    return Device(
        (name(device) or b"").decode("utf-8", "replace"),
        (description(device) or b"").decode("utf-8", "replace"),
        min(free.value, total.value),  # a driver's budget that is overdrawn wraps around
        total.value,
    )


def offload(
    path: Path,
    n_ctx: int | None,
    n_sequences: int,
    on: Sequence[Device],
    n_batch: int | None = None,
    cache_type: str = "f16",
) -> Offload:
    """Tell how many layers of a model fit on devices, with their cache and work space.

    Args:
        n_ctx, n_sequences: of the context; n_ctx None: as `check_fits`.
        on: the devices.
        n_batch: rows of a batch. None: `N_BATCH`.
        cache_type: of the context.

    Raises:
        ModelNotFoundError, ModelFormatError: the file cannot be read.
    """
    header = read_model(path)
    n_ctx = n_ctx or min(DEFAULT_N_CTX, header.n_ctx_train or DEFAULT_N_CTX)
    layers = _layers(header)
    cache = cache_bytes(header, n_ctx, n_sequences, cache_type)
    for i in range(len(layers) - 1):  # as if all were alike
        layers[i] += -(-cache // (len(layers) - 1))
    work = _work(header, n_ctx, n_batch or N_BATCH)
    n = layers_that_fit(layers, work, on)
    return Offload(n, len(layers), sum(layers[len(layers) - n :]) + (work if n else 0))


def layers_that_fit(layers: Sequence[int], work: int, on: Sequence[Device]) -> int:
    """Return how many of the last layers fit on devices.

    llama.cpp gives each device a number of layers in proportion to its free memory.

    Args:
        layers: bytes of each.
        work: bytes that each device with a layer needs besides.
    """
    free = sum(device.free for device in on)
    ends = [end / free for end in accumulate(device.free for device in on)] if free else []
    for n in range(len(layers) if free else 0, 0, -1):
        taken = [0] * len(on)
        for i, size in enumerate(layers[-n:]):
            taken[bisect_right(ends, i / n)] += size
        if all(not size or size + work <= device.room for size, device in zip(taken, on, strict=True)):
            return n
    return 0


def _layers(header: Header) -> list[int]:
    """Return the bytes of the tensors of each layer, with the output as the last."""
    tensors = header.tensors
    sizes = [0] * (header.number("block_count") + 1)
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        if match and int(match[1]) < len(sizes):
            sizes[int(match[1])] += _size(tensor)
        elif not _INPUT.search(name) or (name == "token_embd.weight" and "output.weight" not in tensors):
            sizes[-1] += _size(tensor)  # one table serves at both ends, and is copied
    return sizes


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    n, base = math.prod(tensor.shape), library("ggml-base")
    block_of = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int)(("ggml_blck_size", base))
    bytes_of = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int)(("ggml_type_size", base))
    block = block_of(tensor.kind) if tensor.kind < lib.GGML_TYPE_COUNT else 0
    if block == 0:  # a type of another version: llama.cpp will not load it
        return 4 * n
    n_bytes: int = bytes_of(tensor.kind) * n // block
    return n_bytes


def _work(header: Header, n_ctx: int, n_batch: int) -> int:
    """Estimate the work space of a device, whose attention is llama.cpp's flash attention."""
    inner = max(header.per_layer("feed_forward_length", 0), default=0)
    experts = header.number("expert_used_count") * header.number("expert_feed_forward_length")
    width = 4 * header.number("embedding_length") + 3 * max(inner, experts)
    return 4 * (n_batch * (width + n_ctx) + _N_OUTPUTS * header.n_vocab)
