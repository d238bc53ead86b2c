"""Files that would end the process inside llama.cpp, told from their headers.

llama.cpp refuses most of what is wrong with a file by itself. Checked here is what it asserts, where it
divides by zero or never ends, and whether its tokenizer can spell every text. What published files say
passes, missing keys and numbers per layer too. Limits and architectures are those of the version that
`pyproject.toml` wants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from amulet_gguf.errors import ModelFormatError
from amulet_gguf.errors import shown as quoted
from amulet_gguf.llama.gguf import Header, Tensor, read_model, read_tokens, shown

_MAX_LAYERS: Final = 512
_MAX_EXPERTS: Final = 1024
_MAX_WINDOW: Final = 2**24  # times 256 sequences it has to fit into 32 bits
#: What the CPU wants the beginnings of tensors to be multiples of.
_ALIGNMENT: Final = 32
_ROPE_SCALINGS: Final = ("none", "linear", "yarn", "longrope")
_EPSILONS: Final = ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon")
_F32: Final = 0
#: Types that are no weights' in llama.cpp.
_NO_WEIGHTS: Final = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
#: Ends of the names of tensors that hold numbers of tokens or experts.
_INDEXES: Final = ("d2t", "tid2eid", "tid2eid.weight")
#: Ends of the names of tensors that must be of type F32, as all vectors must.
_PLAIN: Final = ("_norm.weight", ".ssm_conv1d.weight", ".shortconv.conv.weight", ".ssm_a", ".ssm_d")
_ATTENTION: Final = re.compile(r"blk\.[0-9]+\.attn_")
_NO_TENSOR: Final = Tensor((), _F32)
_RECURRENT: Final = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
#: Architectures with attention that knows no rotations.
_NOT_ROTATED: Final = frozenset({
    "bloom", "glm5-next", "gpt2", "gptj", "jais", "jamba", "jina-bert-v2", "kimi-k3", "kimi-linear",
    "mpt", "nemotron_h", "nemotron_h_moe", "refact", "t5", "t5encoder",
})  # fmt: skip
#: Of these, one expert is none.
_ONE_EXPERT: Final = ("hunyuan-dense", "hunyuan_vl")
#: Architectures of which some layer must look through the sliding window, if there is one.
_SLIDING: Final = ("cohere2", "gemma2", "gemma3", "gpt-oss", "olmo2")
#: Architectures whose queries come with a gate of their size.
_GATED: Final = ("qwen3next", "qwen35", "qwen35moe", "qwen4exp")
#: Architectures (the common ones) that turn heads as a whole.
_ALL_ROTATED: Final = frozenset({
    "arcee", "baichuan", "dbrx", "deepseek", "dots1", "ernie4_5", "ernie4_5-moe", "exaone", "exaone4",
    "granite", "granitemoe", "hunyuan-moe", "internlm2", "llama4", "mistral3", "olmo", "olmo2", "olmoe",
    "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "seed_oss",
    "smallthinker", "smollm3", "starcoder2",
})  # fmt: skip
_SINGLE_BYTES: Final = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # those of UTF-8


def check(path: Path) -> None:
    """Refuse a model on which llama.cpp would end or hang the process.

    Raises:
        ModelNotFoundError: there is no such file, or it cannot be read.
        ModelFormatError: it is not a GGUF file, a damaged one, or one that contradicts itself.
    """
    header = read_model(path)
    for fault in _faults(header, read_tokens(path, header)):
        raise ModelFormatError(
            f"{shown(path)} contradicts itself: {fault}; download it again, or choose another model "
            "(--trust-model loads it all the same)"
        )


def _faults(header: Header, tokens: list[bytes]) -> Iterator[str]:
    yield from _in_tensors(header)
    yield from _in_layers(header)
    yield from _in_experts(header)
    yield from _in_attention(header)
    yield from _in_vocabulary(header.text("tokenizer.ggml.model"), tokens)


def _in_tensors(header: Header) -> Iterator[str]:
    alignment = header.metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % _ALIGNMENT:
        yield f"general.alignment is {quoted(alignment)}"
    for name, (shape, kind) in header.tensors.items():
        if kind in _NO_WEIGHTS and not name.endswith(_INDEXES):
            yield f"the tensor {quoted(name)} is of type {_NO_WEIGHTS[kind]}"
        if kind != _F32 and (len(shape) < 2 or name.endswith(_PLAIN)) and not name.endswith(_INDEXES):
            yield f"the tensor {quoted(name)} is not of type F32"


def _in_layers(header: Header) -> Iterator[str]:
    n_layers = header.number("block_count", 1)
    if not 0 < n_layers <= _MAX_LAYERS:
        yield f"it has {n_layers} layers"
    if header.number("nextn_predict_layers") > n_layers:
        yield f"{header.number('nextn_predict_layers')} of {n_layers} layers predict tokens ahead"
    for name in _EPSILONS:
        epsilon = header.metadata.get(f"{header.architecture}.attention.{name}", 0.0)
        if isinstance(epsilon, float) and not 0 <= epsilon < math.inf:
            yield f"attention.{name} is {epsilon}"


def _in_experts(header: Header) -> Iterator[str]:
    n_experts = header.number("expert_count")
    n_used = max(header.per_layer("expert_used_count", 0), default=0)
    if header.architecture in _ONE_EXPERT and n_experts <= 1:
        return
    if n_experts > _MAX_EXPERTS or not min(n_experts, 1) <= n_used <= n_experts:
        yield f"{n_used} of {n_experts} experts are used"
    n_groups = header.number("expert_group_count")
    n_used_groups = header.number("expert_group_used_count")
    if n_groups and n_groups >= n_experts:
        yield f"{n_experts} experts are in {n_groups} groups"
    if n_groups > 1 and (n_experts % n_groups or not 0 < n_used_groups < n_groups):
        yield f"{n_used_groups} of {n_groups} groups of {n_experts} experts are used"


def _in_attention(header: Header) -> Iterator[str]:
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALINGS:
        yield f"rope.scaling.type is {quoted(scaling)}"
    window = header.number("attention.sliding_window")
    if window > _MAX_WINDOW:
        yield f"attention.sliding_window is {window}"
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern", 0)
    slides = any(pattern) if isinstance(pattern, list) else pattern != 1
    if header.architecture in _SLIDING and window and not slides:
        yield "it has a sliding window, which no layer looks through"
    if header.architecture in _RECURRENT:
        return
    heads = header.per_layer("attention.head_count", 0)
    if max(heads, default=0) < 1 and any(map(_ATTENTION.match, header.tensors)):
        yield "its attention has no heads"
    n_numbers = header.number("embedding_length")
    if max(heads, default=0) > n_numbers:
        yield f"it has {max(heads)} heads of attention for {n_numbers} numbers"
    yield from _in_heads(header, heads)
    if heads and heads[0] > 0 and header.architecture not in _NOT_ROTATED:
        yield from _in_rotations(header, n_numbers // heads[0])


def _in_heads(header: Header, heads: list[int]) -> Iterator[str]:
    """Some architectures compare only the first layer's numbers, or none, with the tensors' shapes."""
    has_kv_heads = f"{header.architecture}.attention.head_count_kv" in header.metadata
    kv_heads = header.per_layer("attention.head_count_kv", 0) if has_kv_heads else heads
    gate = 2 if header.architecture in _GATED else 1
    for layer, (n, n_kv) in enumerate(zip(heads, kv_heads, strict=True)):
        if f"blk.{layer}.ssm_a" in header.tensors:  # linear attention has numbers of its own
            continue
        query = header.tensors.get(f"blk.{layer}.attn_q.weight", _NO_TENSOR).shape[1:]
        key = header.tensors.get(f"blk.{layer}.attn_k.weight", _NO_TENSOR).shape[1:]
        if query and n < 1:
            yield f"layer {layer} has no heads of attention"
        if query and key and query[0] * n_kv != gate * key[0] * n:
            yield f"layer {layer} has {n} and {n_kv} heads for {query[0]} and {key[0]} numbers"


def _in_rotations(header: Header, size: int) -> Iterator[str]:
    size = header.number("attention.key_length", size)
    rotated = header.number("rope.dimension_count", size)
    if header.architecture in _ALL_ROTATED and rotated != size:
        yield f"rope.dimension_count is {rotated} of heads of {size}"
    for suffix in ("", "_swa"):
        size = header.number(f"attention.key_length{suffix}", size)
        rotated = header.number(f"rope.dimension_count{suffix}", rotated)
        if not 0 < rotated <= size or (rotated % 2 and rotated < size):
            yield f"rope.dimension_count{suffix} is {rotated} of heads of {size}"


def _in_vocabulary(tokenizer: str, tokens: list[bytes]) -> Iterator[str]:
    spellings = set(tokens)
    if b"" in spellings or b"\0" in b"".join(tokens):
        # llama.cpp reads to the first zero byte, and gives a spelling to tokens that have none.
        spellings = {token.partition(b"\0")[0] or b"[EMPTY_%d]" % i for i, token in enumerate(tokens)}
    if len(spellings) < len(tokens):
        yield f"{len(tokens) - len(spellings)} of its {len(tokens)} tokens are spelled like others"
    if tokenizer == "bert" and b"<0x0A>" in spellings:
        yield "its vocabulary is none of the tokenizer bert"
    if tokenizer in ("llama", "plamo2"):
        for byte in _SINGLE_BYTES:
            if not {b"<0x%02X>" % byte, bytes([byte])} & spellings:
                yield f"its vocabulary has no token for the byte {byte}"
